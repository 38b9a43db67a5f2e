"""Running averages of the Kronecker factors A and G, stacked over layers of equal shape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

FactorKind = Literal["dense", "block-diagonal", "diagonal", "identity"]


@dataclass(frozen=True)
class BlockShape:
    """Shapes of one layer's block A ⊗ G, one block per group.

    A is ``[groups, d_in, d_in]`` and G ``[groups, d_out, d_out]``. ``"block-diagonal"`` makes it
    ``[groups, blocks, b, b]`` with the blocks of ``b`` consecutive rows, of which the last is
    filled up with zeros; ``"diagonal"`` drops the last dimension and ``"identity"`` keeps no tensor
    at all. The gradient is ``[groups, d_out, d_in]``.

    Attributes:
        groups: Number of blocks of the layer's curvature.
        d_in: Inputs per group.
        d_out: Outputs per group.
        a_kind: What is kept of A.
        g_kind: What is kept of G.
        a_block: Rows of a block of a block-diagonal A, else 0.
        g_block: Rows of a block of a block-diagonal G, else 0.
    """

    groups: int
    d_in: int
    d_out: int
    a_kind: FactorKind = "dense"
    g_kind: FactorKind = "dense"
    a_block: int = 0
    g_block: int = 0

    def sizes(self) -> dict[str, int]:
        """Number of rows of each factor that is kept, by name ("A", "G")."""
        factors = {"A": (self.a_kind, self.d_in), "G": (self.g_kind, self.d_out)}
        return {name: d for name, (kind, d) in factors.items() if kind != "identity"}

    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors that are kept, by name ("A", "G")."""
        shapes = {}
        kinds = {"A": (self.a_kind, self.a_block), "G": (self.g_kind, self.g_block)}
        for name, d in self.sizes().items():
            kind, block = kinds[name]
            shapes[name] = {
                "dense": (self.groups, d, d),
                "block-diagonal": (self.groups, -(-d // max(block, 1)), block, block),
            }.get(kind, (self.groups, d))
        return shapes


@dataclass
class Bucket:
    """Layers whose blocks have one shape, dtype and device, stacked along a first axis.

    The running average keeps its total weight w, so that it is exact from the first update on,
    whatever the decay β and however it changes: w ← βw + 1, v ← v + (new − v)/w.

    Attributes:
        names: Names of the layers, in stacking order.
        shape: Shape of each layer's block.
        with_second_moments: Whether S is kept too, the second moments of per-example gradients.
        factors: "A" ``[layers, groups, d_in, d_in]`` and "G" ``[layers, groups, d_out, d_out]``,
            and "S" ``[layers, groups, d_out, d_in]``.
        pending: Sums of the statistics since the last step, like ``factors``.
        weight: Total weight of each layer's running average ``[layers]``; 0 before the first.
        rows: Number of input rows in each layer's pending sum of A; a tensor where it is data.
        is_empty: Whether nothing is pending.
    """

    names: list[str]
    shape: BlockShape
    dtype: torch.dtype
    device: torch.device
    with_second_moments: bool = False
    factors: dict[str, Tensor] = field(init=False)
    pending: dict[str, Tensor] = field(init=False)
    weight: Tensor = field(init=False)
    rows: list[int | Tensor] = field(init=False)
    is_empty: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.factors = self._zeros()
        self.pending = self._zeros()
        self.weight = torch.zeros(len(self.names), dtype=self.dtype, device=self.device)
        self.rows = [0] * len(self.names)

    @property
    def kronecker_factors(self) -> dict[str, Tensor]:
        """The running averages of A and G."""
        return {name: factor for name, factor in self.factors.items() if name != "S"}

    def _zeros(self) -> dict[str, Tensor]:
        stack, block = len(self.names), self.shape
        shapes = block.factor_shapes()
        if self.with_second_moments:
            shapes["S"] = (block.groups, block.d_out, block.d_in)
        return {
            name: torch.zeros(stack, *shape, dtype=self.dtype, device=self.device)
            for name, shape in shapes.items()
        }

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow a model that has been moved or converted after construction."""
        if device == self.device and dtype == self.dtype:
            return
        self.device, self.dtype = device, dtype
        self.weight = self.weight.to(device, dtype)
        for tensors in (self.factors, self.pending):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(device, dtype)

    def accumulate(self, index: int, name: str, moment: Tensor, rows: int | Tensor = 0) -> None:
        """Add one batch's unnormalised second moment to a layer's pending sum.

        Args:
            index: Position of the layer in the bucket.
            name: "A", "G" or "S".
            moment: Sum of outer products, of the shape of one layer's factor.
            rows: Number of input rows that the sum is over (for "A").
        """
        self.pending[name][index] += moment
        self.rows[index] += rows
        self.is_empty = False

    def discard(self) -> None:
        """Forget what is pending."""
        if not self.is_empty:
            for tensor in self.pending.values():
                tensor.zero_()
            self.rows = [0] * len(self.names)
            self.is_empty = True

    def normalize(self, g_scale: Tensor) -> Tensor:
        """Turn the pending sums into averages: A by its number of rows, G and S by a factor.

        Args:
            g_scale: What the pending sums of G and S are multiplied by, a scalar tensor.

        Returns:
            ``[layers]``: 1 for a layer with statistics, 0 for one without.
        """
        rows = self._row_counts()
        if "A" in self.pending:
            self.pending["A"] /= _like(rows.clamp(min=1), self.pending["A"])
        for name in self.pending.keys() - {"A"}:
            self.pending[name] *= g_scale.to(self.pending[name])
        return rows.clamp(max=1)

    def _row_counts(self) -> Tensor:
        """Number of rows of each layer, ``[layers]``; without waiting for the device."""
        known = [0 if isinstance(count, Tensor) else count for count in self.rows]
        counts = torch.tensor(known, dtype=self.dtype).to(self.device, non_blocking=True)
        for index, count in enumerate(self.rows):
            if isinstance(count, Tensor):
                counts[index] = count
        return counts

    def fold(self, present: Tensor, decay: float, accept: Tensor) -> Tensor:
        """Fold pending averages into the running ones and forget them.

        A layer without statistics in this batch keeps its average. So does one with a statistic
        that is not finite.

        Args:
            present: Of how many processes each layer's pending averages are the sum ``[layers]``.
            decay: β in [0, 1).
            accept: Boolean scalar tensor; False drops this batch for every layer.

        Returns:
            Boolean ``[layers]``: whose statistics were dropped.
        """
        finite = torch.stack([_are_finite(pending) for pending in self.pending.values()]).all(0)
        seen = present > 0
        usable = seen & finite & accept.to(self.device)
        total = decay * self.weight + 1
        share = torch.where(usable, 1 / total, 0.0)
        for name, pending in self.pending.items():
            average = self.factors[name]
            pending.masked_fill_(~_like(usable, pending), 0.0)
            average.mul_(_like(1 - share, average))
            average.addcmul_(pending, _like(share / present.clamp(min=1), pending))
        self.weight = torch.where(usable, total, self.weight)
        self.discard()
        return seen & ~usable


def _like(vector: Tensor, target: Tensor) -> Tensor:
    """View ``[layers]`` so that it broadcasts along the first axis of ``target``."""
    return vector.view(-1, *[1] * (target.dim() - 1))


def _are_finite(stack: Tensor) -> Tensor:
    """Whether every element of each layer is finite, ``[layers]``."""
    return stack.flatten(1).sum(1).isfinite()


def fill_buckets(
    names: Sequence[str],
    shapes: Sequence[BlockShape],
    dtypes: Sequence[torch.dtype],
    devices: Sequence[torch.device],
    *,
    with_second_moments: bool = False,
) -> list[Bucket]:
    """Group layers of equal shape, dtype and device, keeping the order of first appearance."""
    members: dict[tuple[BlockShape, torch.dtype, torch.device], list[str]] = {}
    for name, shape, dtype, device in zip(names, shapes, dtypes, devices, strict=True):
        members.setdefault((shape, dtype, device), []).append(name)
    return [Bucket(layers, *key, with_second_moments) for key, layers in members.items()]


def nearest_kronecker(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The Kronecker product A ⊗ G nearest to a sum Σᵢ Aᵢ ⊗ Gᵢ in the Frobenius norm.

    Rearranged so that each Kronecker product is an outer product vec(Aᵢ) vec(Gᵢ)ᵀ, the sum has the
    rank of the number of pairs; its leading singular vectors are combinations of the Aᵢ and of the
    Gᵢ, so that only Gram matrices as small as that number are involved. The combinations of
    positive semi-definite factors have coefficients that are not negative.

    Args:
        pairs: The Aᵢ, all of one shape, and the Gᵢ likewise.

    Returns:
        A and G, exact wherever the sum is a Kronecker product.

    Source:
        Van Loan & Pitsianis 1993, "Approximation with Kronecker products".
    """
    firsts, seconds = (torch.stack(side) for side in zip(*pairs, strict=True))
    gram_a, gram_g = (_gram(side).double() for side in (firsts, seconds))
    power = gram_g @ gram_a
    for _ in range(_SQUARINGS):
        power = power / power.trace().clamp(min=torch.finfo(power.dtype).tiny)
        power = power @ power
    alpha = power.sum(1)
    beta = gram_a @ alpha
    norms = (alpha @ gram_a @ alpha) * (beta @ gram_g @ beta)
    # σ uᵀv with u and v of length one: σ = uᵀ (Σ vec(Aᵢ) vec(Gᵢ)ᵀ) v.
    scale = (alpha @ gram_a) @ (gram_g @ beta) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    a = torch.tensordot(alpha.to(firsts), firsts, 1)
    return a, torch.tensordot((scale * beta).to(seconds), seconds, 1)


def as_kind(factor: Tensor, like: Tensor) -> Tensor:
    """What a factor that is kept like another one holds of this one; zero in rows beyond its own.

    Args:
        factor: ``[groups, d, d]``, ``[groups, d]`` or ``[groups, blocks, b, b]``.
        like: Likewise; shape, dtype and device of the result.
    """
    result = torch.zeros_like(like)
    if like.dim() == 2:
        diagonal = factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1).flatten(1)
        rows = min(diagonal.shape[1], like.shape[1])
        result[:, :rows] = diagonal[:, :rows]
        return result
    if factor.dim() == 2:
        factor = factor.diag_embed()
    for start, target in _blocks(result):
        for other_start, source in _blocks(factor):
            first = max(start, other_start)
            last = min(start + target.shape[-1], other_start + source.shape[-1])
            if first < last:
                here, there = (slice(first - s, last - s) for s in (start, other_start))
                target[:, here, here] = source[:, there, there]
    return result


def whole_blocks(factor: Tensor, rows: int) -> list[Tensor]:
    """The blocks of a factor without what the last one is filled up with.

    Args:
        factor: ``[..., groups, d, d]``, which is one block, or ``[..., groups, blocks, b, b]``.
        rows: Number of rows of the factor.

    Returns:
        Views ``[..., groups, n, r, r]``: all blocks, or those before the last and the last.
    """
    if factor.shape[-1] == rows:
        return [factor.unsqueeze(-3)]
    size = factor.shape[-1]
    whole, rest = divmod(rows, size)
    parts = [factor[..., :whole, :, :], factor[..., whole:, :rest, :rest]]
    return [part for part in parts if part.numel()]


def _blocks(factor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and view ``[groups, b, b]`` of each block."""
    blocks = factor.unsqueeze(1) if factor.dim() == 3 else factor
    for index, block in enumerate(blocks.unbind(1)):
        yield index * block.shape[-1], block


# Squarings of a matrix after which its powers have converged to the leading eigenvector, or the
# gap is so small that either is as good.
_SQUARINGS = 12


def _gram(stack: Tensor) -> Tensor:
    flat = stack.flatten(1)
    return flat @ flat.T
