"""What a layer type provides: rows of inputs and output gradients, moments, a gradient matrix."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac.covariance import gram
from kfac.example_gradients import Basis, squared_gradients
from kfac.factors import BlockShape, FactorKind

WeightSharing = Literal["expand", "reduce"]
# What the first axis of a weight holds: outputs (and :meth:`Layer.matrix` is a reshape), inputs
# (a transpose), or inputs of kernels that have to be flipped.
Layout = Literal["outputs first", "inputs first", "flipped"]


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter, or a range of its rows: a packed projection holds those of three layers."""

    parameter: nn.Parameter
    rows: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's part of a tensor shaped like the parameter."""
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def shape(self) -> torch.Size:
        """Shape of the piece."""
        return self.of(self.parameter).shape

    @property
    def size(self) -> int:
        """Number of elements of the piece."""
        return self.shape.numel()


@dataclass(frozen=True)
class Part:
    """Which of a module's parameters make up one linear layer.

    Attributes:
        suffix: Added to the module's name to make the layer's; empty where there is one part.
        weight: Attribute that holds the weight.
        bias: Attribute that holds the bias, which may be missing.
        weight_rows: Range of the weight's rows, None for all.
        bias_rows: Range of the bias' rows, None for all.
    """

    suffix: str = ""
    weight: str = "weight"
    bias: str = "bias"
    weight_rows: slice | None = None
    bias_rows: slice | None = None


class Layer(ABC):
    """One linear layer under K-FAC: s = W a (+ b).

    Its gradient is a matrix ``[groups, d_out, d_in]``, where the bias is the weight of a constant-1
    last input. Everything below this class sees only that matrix and the factors
    A ``[groups, d_in, d_in]`` and G ``[groups, d_out, d_out]``; everything that depends on the type
    of the module is in its subclasses. They have to provide the rows a and the gradients of s;
    moments, means and sums follow, and are overridden where there is a faster way.

    Args:
        name: Dotted name of the module in the model, with the part's suffix.
        module: The module; its type is one of ``module_types`` exactly.
        weight_sharing: How positions that share the weight enter the factors.
        weight: The weight.
        bias: The bias if it is trained together with the weight.
        max_factor_dim: See :func:`factor_kind`.
        identity_g: Keep no G at all (forward-only curvature).

    Attributes:
        primary: The layer whose block this one's weight belongs to; itself unless it is tied.
        is_transposed: Whether this layer's gradient is the transpose of the block's.

    Source:
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural
        Network Architectures", section 3.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    # Dotted names of types in packages that need not be installed.
    foreign_types: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[Layout] = "outputs first"
    # ``F.linear`` with the weight and the bias computes the layer.
    calls_linear: ClassVar[bool] = False
    # The module hands its weight to functions: there is no call of a module that is the layer.
    is_functional: ClassVar[bool] = False
    # Inputs that are nearly all zero: A keeps its diagonal only, which is all there is of it where
    # at most one of them is not zero.
    has_sparse_inputs: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        weight_sharing: WeightSharing,
        weight: Piece,
        bias: Piece | None,
        max_factor_dim: int,
        identity_g: bool,
    ) -> None:
        self.name = name
        self.module = module
        self.weight_sharing = weight_sharing
        self.weight = weight
        self.primary: Layer = self
        self.is_transposed = False
        self.bias = bias
        groups, d_in, d_out = self.dimensions()
        d_in += bias is not None

        a: tuple[FactorKind, int] = factor_kind(d_in, max_factor_dim, self.inputs_together)
        g: tuple[FactorKind, int] = factor_kind(d_out, max_factor_dim)
        if self.has_sparse_inputs:
            a = ("diagonal", 0)
        if identity_g:
            g = ("identity", 0)
        self.shape = BlockShape(groups, d_in, d_out, a[0], g[0], a[1], g[1])

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module of this type is not taken for what it is set to, None if it is."""
        return None

    @classmethod
    def parts(cls, module: nn.Module) -> Sequence[Part]:
        """The linear layers that a module of this type consists of."""
        return [Part()]

    @property
    def block(self) -> str:
        """Name of the layer whose factors this one's statistics go to."""
        return self.name if self.is_transposed else self.primary.name

    @property
    def has_bias(self) -> bool:
        """Whether the block contains the bias."""
        return self.bias is not None

    @property
    def pieces(self) -> list[Piece]:
        """What this layer's block consists of: the weight, then the bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of :attr:`pieces`."""
        return [piece.parameter for piece in self.pieces]

    @property
    def is_trained(self) -> bool:
        """Whether the weight still requires a gradient."""
        return self.weight.parameter.requires_grad

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors: that of the weight, but float32 at least."""
        return torch.promote_types(self.weight.parameter.dtype, torch.float32)

    def observed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What of a call's arguments is kept for the backward pass: the ``x`` of the methods below.

        One tensor, the first argument by default. A layer whose rows depend on several arguments
        puts them together here.
        """
        x: Tensor = args[0] if args else kwargs["input"]
        return x

    def as_called(self) -> "Layer":
        """The layer as the call that is under way computes it, should the module change later."""
        return self

    def problem_of_call(self, x: Tensor, output: Tensor) -> str | None:
        """What a call has computed that the module's settings do not say, None if nothing."""
        return None

    @abstractmethod
    def dimensions(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs per group, without the bias."""

    @property
    def inputs_together(self) -> int:
        """So many consecutive inputs stay in one block of a block-diagonal A."""
        return 1

    # --- inputs and output gradients -----------------------------------------------------------

    @abstractmethod
    def leading_size(self, x: Tensor) -> int:
        """Size of the axis of the input that holds the examples; 1 without such an axis."""

    def tells_examples(self, x: Tensor, examples: int) -> bool:
        """Whether the axis of :meth:`leading_size`, a multiple of ``examples``, holds these."""
        return True

    def leading_part(self, x: Tensor, size: int) -> tuple["Layer", Tensor]:
        """What a call on all examples has computed for the first of them.

        Args:
            x: The input with the axis of :meth:`leading_size`.
            size: So much of this axis is kept.

        Returns:
            The layer and the input that have the same rows, and no others.
        """
        return self, x[:size]

    @abstractmethod
    def row_count(self, x: Tensor) -> int:
        """Number of rows a in the module's input: examples times positions."""

    @abstractmethod
    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """The inputs a ``[examples, positions, groups, d_in]``, with a last 1 for a bias."""

    @abstractmethod
    def gradient_rows(self, g: Tensor, examples: int) -> Tensor:
        """The gradients of s ``[examples, positions, groups, d_out]``."""

    def input_moment(self, x: Tensor) -> Tensor:
        """Σ a aᵀ (or its diagonal) over all rows of the module's input."""
        return row_moment(self.input_rows(x, 1)[0], self.shape.factor_shapes()["A"])

    def gradient_moment(self, g: Tensor) -> Tensor:
        """Σ g gᵀ (or its diagonal) over all rows of the gradient of the module's output."""
        return row_moment(self.gradient_rows(g, 1)[0], self.shape.factor_shapes()["G"])

    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean of a over the positions of each example, ``[examples, groups, d_in]``."""
        return self.input_rows(x, examples).mean(1)

    def gradient_sum(self, g: Tensor, examples: int) -> Tensor:
        """Sum of g over the positions of each example, ``[examples, groups, d_out]``."""
        return self.gradient_rows(g, examples).sum(1)

    def leading_shape(self, x: Tensor) -> tuple[int, ...]:
        """Sizes of the axes of examples and positions that a mask may have; empty for none."""
        return ()

    def masked_moment(self, x: Tensor, mask: Tensor) -> Tensor:
        """As :meth:`input_moment`, over the rows where ``mask [rows]`` is 1 and not 0."""
        rows = self.input_rows(x, 1)[0]
        rows = rows * mask.to(rows).view(-1, 1, 1)
        return row_moment(rows, self.shape.factor_shapes()["A"])

    def masked_sum(self, x: Tensor, mask: Tensor) -> Tensor:
        """Sum of a over the positions where ``mask [examples, positions]`` is 1 and not 0."""
        rows = self.input_rows(x, len(mask))
        return (rows * mask.to(rows).unsqueeze(-1).unsqueeze(-1)).sum(1)

    def squared_gradients(self, x: Tensor, g: Tensor, examples: int, basis: Basis) -> Tensor:
        """Σ over examples of the squares of their gradients in a basis, ``[groups, d_out, d_in]``.

        See :func:`kfac.example_gradients.squared_gradients`.
        """
        return squared_gradients(
            self.input_rows(x, examples), self.gradient_rows(g, examples), basis
        )

    def block_rows(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """Rows a and g of the block that the weight belongs to: exchanged if it is transposed."""
        inputs, gradients = self.input_rows(x, examples), self.gradient_rows(g, examples)
        if not self.is_transposed:
            return inputs, gradients
        bias = self.primary.shape.d_in - gradients.shape[-1]
        return F.pad(gradients, (0, bias)), inputs

    def summed_gradient(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Σ g aᵀ over all rows, ``[groups, d_out, d_in]``: the gradient, as a matrix.

        Also ‖a‖ ‖g‖ over all rows, the scale of the rounding errors in the sum.
        """
        inputs, gradients = self.input_rows(x, 1)[0], self.gradient_rows(g, 1)[0]
        total = torch.einsum("rgo,rgi->goi", gradients, inputs)
        return total, inputs.norm() * gradients.norm()

    # --- parameters as a matrix ----------------------------------------------------------------

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Arrange tensors shaped like the pieces as ``[groups, d_out, d_in]``."""
        matrix = weight.reshape(self.shape.groups, self.shape.d_out, -1)
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(self.shape.groups, -1, 1)], dim=-1)

    def unmatrix(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`matrix`: tensors shaped like :attr:`pieces`, in that order."""
        if self.bias is None:
            return [matrix.reshape(self.weight.shape)]
        weight, bias = matrix[..., :-1], matrix[..., -1]
        return [weight.reshape(self.weight.shape), bias.reshape(self.bias.shape)]

    def gradient_matrix(self, gradients: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The layer's gradient ``[groups, d_out, d_in]``, zero for a bias without one."""
        weight = self.weight.of(gradients[self.weight.parameter])
        if self.bias is None:
            return self.matrix(weight, None)
        parameter = self.bias.parameter
        bias = gradients[parameter] if parameter in gradients else torch.zeros_like(parameter)
        return self.matrix(weight, self.bias.of(bias))


# A factor that would need more blocks than this keeps only its diagonal.
MOST_BLOCKS = 32


def factor_kind(size: int, most: int, together: int = 1) -> tuple[FactorKind, int]:
    """How to keep a factor of so many rows, and the rows of its blocks.

    Args:
        size: Number of rows.
        most: Rows of the largest matrix.
        together: Blocks have a multiple of so many rows, unless a block has no room for them.
    """
    if size <= most:
        return "dense", 0
    together = together if together <= most else 1
    units = -(-size // together)
    blocks = -(-units // (most // together))
    rows = -(-units // blocks) * together
    return ("diagonal", 0) if blocks > MOST_BLOCKS or rows == 1 else ("block-diagonal", rows)


def row_moment(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Σ r rᵀ per group of rows ``[n, groups, d]``, or what a factor of this shape keeps of it."""
    if len(shape) == 2:
        return rows.square().sum(0)
    if len(shape) == 3:
        return gram(rows)
    moment = rows.new_zeros(shape)
    for index, part in enumerate(torch.split(rows, shape[-1], -1)):
        size = part.shape[-1]
        moment[:, index, :size, :size] = row_moment(part, (shape[0], size, size))
    return moment


def append_one(rows: Tensor) -> Tensor:
    """Append the constant-1 input to rows ``[..., d]``."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
