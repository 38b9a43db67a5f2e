"""What a layer type provides: second moments of its inputs and output gradients, its gradient."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kfac.factors import BlockShape, FactorKind

WeightSharing = Literal["expand", "reduce"]


class Layer(ABC):
    """One module under K-FAC.

    A layer s = W a (+ b) has a gradient matrix ``[groups, d_out, d_in]``, where the bias is the
    weight of a constant-1 last input. Everything below this class sees only that matrix and the
    factors A ``[groups, d_in, d_in]`` and G ``[groups, d_out, d_out]``; everything that depends on
    the type of the module is in its subclasses.

    Args:
        name: Dotted name of the module in the model.
        module: The module; its type is one of ``module_types`` exactly.
        weight_sharing: How positions that share the weight enter the factors.
        weight: The module's weight.
        bias: The module's bias if it is trained together with the weight.
        max_factor_dim: A factor larger than this keeps only its diagonal.
        identity_g: Keep no G at all (forward-only curvature).

    Source:
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural
        Network Architectures", section 3.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]]
    # Inputs of which at most one is not zero have a diagonal second moment, however many they are.
    has_one_hot_inputs: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        weight_sharing: WeightSharing,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        max_factor_dim: int,
        identity_g: bool,
    ) -> None:
        self.name = name
        self.module = module
        self.weight_sharing = weight_sharing
        self.weight = weight
        self.bias = bias
        groups, d_in, d_out = self.dimensions()
        d_in += bias is not None

        def kind(dim: int) -> FactorKind:
            return "dense" if dim <= max_factor_dim else "diagonal"

        g_kind: FactorKind = "identity" if identity_g else kind(d_out)
        a_kind: FactorKind = "diagonal" if self.has_one_hot_inputs else kind(d_in)
        self.shape = BlockShape(groups, d_in, d_out, a_kind, g_kind)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module of this type is not taken for what it is set to, None if it is."""
        return None

    @property
    def has_bias(self) -> bool:
        """Whether the block contains the bias."""
        return self.bias is not None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in this layer's block."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the factors: that of the weight, but float32 at least."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def problem_of_call(self, x: Tensor, output: Tensor) -> str | None:
        """What a call has computed that the module's settings do not say, None if nothing."""
        return None

    @abstractmethod
    def dimensions(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs per group, without the bias."""

    @abstractmethod
    def rows(self, x: Tensor) -> int:
        """Number of rows a in the module's input: examples times positions."""

    @abstractmethod
    def input_moment(self, x: Tensor) -> Tensor:
        """Σ a aᵀ (or its diagonal) over all rows of the module's input."""

    @abstractmethod
    def gradient_moment(self, g: Tensor) -> Tensor:
        """Σ g gᵀ (or its diagonal) over all rows of the gradient of the module's output."""

    @abstractmethod
    def input_mean(self, x: Tensor, examples: int) -> Tensor:
        """Mean of a over the positions of each example, ``[examples, groups, d_in]``."""

    @abstractmethod
    def gradient_sum(self, g: Tensor, examples: int) -> Tensor:
        """Sum of g over the positions of each example, ``[examples, groups, d_out]``."""

    @abstractmethod
    def leading_size(self, x: Tensor) -> int:
        """Size of the axis of the input that holds the examples; 1 without such an axis."""

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Arrange tensors shaped like the parameters as ``[groups, d_out, d_in]``."""
        matrix = weight.reshape(self.shape.groups, self.shape.d_out, -1)
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(self.shape.groups, -1, 1)], dim=-1)

    def unmatrix(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`matrix`: tensors shaped like :attr:`parameters`, in that order."""
        weight = self.weight
        if self.bias is None:
            return [matrix.reshape(weight.shape)]
        return [matrix[..., :-1].reshape(weight.shape), matrix[..., -1].reshape(self.bias.shape)]


def row_moment(rows: Tensor, kind: FactorKind) -> Tensor:
    """Σ r rᵀ per group, or its diagonal, of rows ``[n, groups, d]``."""
    if kind == "diagonal":
        return rows.square().sum(0)
    stacked = rows.transpose(0, 1)
    return stacked.mT @ stacked


def append_one(rows: Tensor) -> Tensor:
    """Append the constant-1 input to rows ``[..., d]``."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
