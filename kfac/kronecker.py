"""The curvature of each layer as a matrix: products, solves, traces and determinants."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac.arguments import NON_NEGATIVE, argument_error, check
from kfac.damping import trace
from kfac.factors import BlockShape, whole_blocks
from kfac.layers import Layer
from kfac.products import multiply


@dataclass(frozen=True, eq=False)
class Eigendecomposition:
    """F = Q diag(S) Qᵀ with Q = Q_A ⊗ Q_G, one block per group.

    S is λ_G λ_Aᵀ for a Kronecker product, and any matrix for a curvature that is corrected in its
    eigenbasis (George et al. 2018, EKFAC).

    Attributes:
        q_a: Eigenvectors of A, as columns ``[groups, d_in, d_in]``; None for the unit vectors.
        q_g: Eigenvectors of G, as columns ``[groups, d_out, d_out]``; None for the unit vectors.
        eigenvalues: S ``[groups, d_out, d_in]``, exactly 0 where F is singular.
    """

    q_a: Tensor | None
    q_g: Tensor | None
    eigenvalues: Tensor

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of them all."""
        return self.eigenvalues

    def decomposed(self) -> "Eigendecomposition":
        """Itself."""
        return self

    def product(self, matrices: Tensor) -> Tensor:
        """F times matrices ``[groups, d_out, d_in, k]``."""
        return self.apply(matrices, self.eigenvalues)

    def trace(self) -> Tensor:
        """Sum of the eigenvalues."""
        return self.eigenvalues.sum()

    def apply(self, matrices: Tensor, spectrum: Tensor) -> Tensor:
        """Q diag(spectrum) Qᵀ times matrices ``[groups, d_out, d_in, k]``."""
        q_a, q_g = self.q_a, self.q_g
        rotated = _multiply(None if q_g is None else q_g.mT, matrices, q_a)
        scaled = rotated * spectrum.unsqueeze(-1)
        return _multiply(q_g, scaled, None if q_a is None else q_a.mT)


@dataclass(frozen=True, eq=False)
class Factors:
    """F = A ⊗ G, one block per group.

    Attributes:
        a: A ``[groups, d_in, d_in]``, its diagonal ``[groups, d_in]``, or blocks on its diagonal
            ``[groups, blocks, b, b]``, see :class:`kfac.factors.BlockShape`.
        g: G, likewise, of ``d_out`` rows.
        d_in: Number of rows of A.
        d_out: Number of rows of G.
    """

    a: Tensor
    g: Tensor
    d_in: int
    d_out: int

    @classmethod
    def of(cls, shape: BlockShape, a: Tensor | None, g: Tensor | None) -> "Factors":
        """The factors of a layer, of which one may be None for an identity."""
        like = g if a is None else a
        assert like is not None
        return cls(
            like.new_ones(shape.groups, shape.d_in) if a is None else a,
            like.new_ones(shape.groups, shape.d_out) if g is None else g,
            shape.d_in,
            shape.d_out,
        )

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of them all."""
        return self.a

    def decomposed(self) -> Eigendecomposition:
        """Decompose both factors."""
        on_inputs, q_a = _eigendecomposed(self.a, self.d_in)
        on_outputs, q_g = _eigendecomposed(self.g, self.d_out)
        return Eigendecomposition(q_a, q_g, on_outputs.unsqueeze(-1) * on_inputs.unsqueeze(-2))

    def product(self, matrices: Tensor) -> Tensor:
        """F times matrices ``[groups, d_out, d_in, k]``: G V A."""
        return _multiply(self.g, matrices, self.a)

    def trace(self) -> Tensor:
        """Sum over groups of tr A · tr G."""
        return (trace(self.a.unsqueeze(0)) * trace(self.g.unsqueeze(0))).sum()


class KroneckerBlock:
    """The matrix F ≈ A ⊗ G ``[p, p]`` of one layer, in the order of its parameters.

        block = optimizer.curvature()["encoder.0"]
        v = block.flatten([layer.weight.grad, layer.bias.grad])
        block @ v, block.solve(v, damping=1e-3), block.unflatten(v)

    Rows and columns are those of ``torch.nn.utils.parameters_to_vector`` over the layer's weight
    and bias: ``weight.flatten()``, then the bias. Several groups of a convolution are diagonal
    blocks of F. What is computed has the dtype and the device of the factors, whatever those of the
    vectors are. Nothing is recorded for autograd.

    Args:
        layer: The layer; says where its parameters stand in the factors.
        matrix: F by its factors or by its eigenvectors and eigenvalues.

    Cost:
        A product with k vectors takes k·p·(d_in + d_out) multiplications, the first call that
        takes a damping an eigendecomposition of both factors, which is kept. Memory is that of the
        factors, their eigenvectors and a few vectors; only :meth:`to_dense` forms ``[p, p]``.

    Source:
        Martens & Grosse 2015, section 4.2 and appendix B. Uses: Ritter et al. 2018, "A Scalable
        Laplace Approximation for Neural Networks"; Grosse et al. 2023, "Studying Large Language
        Model Generalization with Influence Functions".
    """

    def __init__(self, layer: Layer, matrix: Factors | Eigendecomposition) -> None:
        self._layer = layer
        self._matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        """``(p, p)``, p the number of the layer's parameters."""
        size = sum(piece.size for piece in self._layer.pieces)
        return size, size

    @cached_property
    def _decomposition(self) -> Eigendecomposition:
        return self._matrix.decomposed()

    # --- products ------------------------------------------------------------------------------

    def __matmul__(self, v: Tensor) -> Tensor:
        """F v.

        Args:
            v: ``[p]``, or ``[p, k]`` for k vectors.

        Returns:
            A tensor of the shape of ``v``.

        Raises:
            ValueError: If ``v`` has another shape.
        """
        return self._map("__matmul__", v, self._matrix.product)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """(F + λI)⁻¹ v, λ damped exactly.

        Args:
            v: ``[p]``, or ``[p, k]`` for k vectors.
            damping: λ >= 0, in units of F.

        Returns:
            A tensor of the shape of ``v``.

        Raises:
            ValueError: If ``v`` has another shape, λ is negative, or λ is 0 and F singular.
        """
        return self._apply("solve", v, damping, torch.reciprocal)

    def sqrt_solve(self, v: Tensor, damping: float) -> Tensor:
        """(F + λI)^(−1/2) v by the symmetric root, so that unit normal v get covariance (F + λI)⁻¹.

        Args:
            v: ``[p]``, or ``[p, k]`` for k vectors.
            damping: λ >= 0, in units of F.

        Returns:
            A tensor of the shape of ``v``.

        Raises:
            ValueError: If ``v`` has another shape, λ is negative, or λ is 0 and F singular.
        """
        return self._apply("sqrt_solve", v, damping, torch.rsqrt)

    def to_dense(self) -> Tensor:
        """F itself, ``[p, p]``."""
        like = self._matrix.like
        return self @ torch.eye(self.shape[0], dtype=like.dtype, device=like.device)

    # --- functions of the eigenvalues ----------------------------------------------------------

    @torch.no_grad()
    def trace(self) -> Tensor:
        """tr F, a scalar tensor."""
        return self._matrix.trace()

    @torch.no_grad()
    def logdet(self, damping: float) -> Tensor:
        """log det(F + λI), a scalar tensor.

        Args:
            damping: λ >= 0, in units of F.

        Raises:
            ValueError: If λ is negative, or λ is 0 and F singular.
        """
        return self._damped("logdet", damping).log().sum()

    # --- parameters as a vector ----------------------------------------------------------------

    @torch.no_grad()
    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors shaped like the layer's parameters to a vector ``[p]``.

        Args:
            tensors: One for the weight and, if the layer has a trained bias, one for it. Of a
                parameter that holds several layers, the whole or this layer's rows.

        Raises:
            ValueError: If their number or a shape does not fit.
        """
        pieces = self._layer.pieces
        parts = [
            piece.of(tensor) if tensor.shape == piece.parameter.shape else tensor
            for piece, tensor in zip(pieces, tensors, strict=False)
        ]
        expected = [tuple(piece.shape) for piece in pieces]
        if len(tensors) != len(pieces) or [tuple(part.shape) for part in parts] != expected:
            given = [tuple(tensor.shape) for tensor in tensors]
            raise argument_error(
                "KroneckerBlock.flatten", "tensors", f"tensors of the shapes {expected}", given,
                self._where,
            )  # fmt: skip
        return torch.cat([part.flatten().to(self._matrix.like) for part in parts])

    @torch.no_grad()
    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Undo :meth:`flatten`: copies of the parts of a vector ``[p]``, shaped like parameters.

        Raises:
            ValueError: If the vector has another shape.
        """
        if vector.shape != self.shape[:1]:
            raise self._shape_error("unflatten", "vector", f"[{self.shape[0]}]", vector)
        return [part.clone() for part in self._parts(vector)]

    # --- between vectors and matrices ----------------------------------------------------------

    def _apply(
        self, method: str, v: Tensor, damping: float, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """f(F + λI) v."""
        return self._map(
            method,
            v,
            lambda matrices: self._decomposition.apply(
                matrices, function(self._damped(method, damping))
            ),
        )

    @torch.no_grad()
    def _map(self, method: str, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function of matrices ``[groups, d_out, d_in, k]`` to vectors."""
        size, like = self.shape[0], self._matrix.like
        if not isinstance(v, Tensor) or v.dim() not in (1, 2) or len(v) != size:
            raise self._shape_error(method, "v", f"[{size}] or [{size}, k]", v)
        columns = v.to(like).reshape(size, -1)
        positions = self._positions()
        with torch.autocast(like.device.type, enabled=False):
            matrices = function(columns[positions])
        result = torch.empty_like(columns)
        result[positions.flatten()] = matrices.flatten(0, 2)
        return result.view(v.shape)

    def _positions(self) -> Tensor:
        """Where in the vector the elements of the matrix ``[groups, d_out, d_in]`` stand."""
        weight, *bias = self._parts(torch.arange(self.shape[0], device=self._matrix.like.device))
        return self._layer.matrix(weight, bias[0] if bias else None)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        """A vector ``[p]`` cut into tensors shaped like the layer's parameters."""
        pieces = self._layer.pieces
        parts = torch.split(vector, [piece.size for piece in pieces])
        return [part.reshape(piece.shape) for part, piece in zip(parts, pieces, strict=True)]

    def _damped(self, method: str, damping: float) -> Tensor:
        """The eigenvalues of F + λI, ``[groups, d_out, d_in]``, all positive."""
        owner = f"KroneckerBlock.{method}"
        check(owner, "damping", damping, NON_NEGATIVE, "Pass 0 for the factors as they are.")
        damped = self._decomposition.eigenvalues + damping
        rank = int((damped > 0).sum())
        if rank < damped.numel():
            raise argument_error(
                owner, "damping", "> 0 for a singular matrix", damping,
                f"{self._where} F has rank {rank} of {damped.numel()}.",
            )  # fmt: skip
        return damped

    def _shape_error(self, method: str, argument: str, shape: str, value: object) -> ValueError:
        given = tuple(value.shape) if isinstance(value, Tensor) else value
        owner = f"KroneckerBlock.{method}"
        return argument_error(owner, argument, f"a tensor of shape {shape}", given, self._where)

    @property
    def _where(self) -> str:
        return f"The layer is {self._layer.name!r}."


class CurvatureBlocks(Mapping[str, KroneckerBlock]):
    """The curvature of all layers at one time, by layer name.

    The matrix of all their parameters is block diagonal, with one :class:`KroneckerBlock` each.
    Layers that have not had any statistics are not in it.

    Args:
        blocks: The block of each layer, None without statistics.
    """

    def __init__(self, blocks: Mapping[str, KroneckerBlock | None]) -> None:
        self._blocks = {name: block for name, block in blocks.items() if block is not None}
        self._without_statistics = blocks.keys() - self._blocks.keys()

    def __getitem__(self, layer: str) -> KroneckerBlock:
        """The block of a layer.

        Raises:
            KeyError: If K-FAC has no layer of this name, or one that has no statistics yet.
        """
        if layer in self._without_statistics:
            raise KeyError(
                f"The layer {layer!r} has no statistics yet. Take a step in which it runs and the "
                "factors are updated, then call curvature() again."
            )
        if layer not in self._blocks:
            raise KeyError(f"No layer {layer!r} under K-FAC; there are {', '.join(self._blocks)}.")
        return self._blocks[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def trace(self) -> Tensor:
        """Sum of the traces of all blocks, a scalar tensor."""
        return _total([block.trace() for block in self.values()])

    def logdet(self, damping: float) -> Tensor:
        """Sum over all blocks of log det(F + λI), a scalar tensor.

        Args:
            damping: λ >= 0, in units of F.

        Raises:
            ValueError: If λ is negative, or λ is 0 and a block singular.
        """
        return _total([block.logdet(damping) for block in self.values()])


def _total(values: Sequence[Tensor]) -> Tensor:
    """Sum of scalars, which may be on several devices."""
    total = torch.zeros(())
    for value in values:
        total = total.to(value.device) + value
    return total


def _multiply(left: Tensor | None, matrices: Tensor, right: Tensor | None) -> Tensor:
    """left · V · right for each V in ``[groups, d_out, d_in, k]``."""
    stacked = matrices.movedim(-1, 0)
    left, right = (
        None if side is None else side.expand(len(stacked), *side.shape) for side in (left, right)
    )
    return multiply(left, stacked, right).movedim(0, -1)


def _eigendecomposed(factor: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues ``[groups, d]`` and eigenvectors; eigenvalues that are rounding errors are 0.

    They are those below d·ε times the largest, as for the rank of a matrix. A diagonal has none.
    """
    if factor.dim() == 2:
        return factor, None
    vectors, values = torch.zeros_like(factor), []
    for blocks, target in zip(whole_blocks(factor, rows), whole_blocks(vectors, rows), strict=True):
        some, columns = torch.linalg.eigh((blocks + blocks.mT) / 2)
        target.copy_(columns)
        values.append(some.flatten(1))
    joined = torch.cat(values, 1)
    error = factor.shape[-1] * torch.finfo(joined.dtype).eps * joined.amax(1, keepdim=True)
    return torch.where(joined > error, joined, 0.0), vectors
