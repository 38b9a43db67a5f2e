"""Factored damping: (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹, however they are computed."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac.damping import damped, factored_damping
from kfac.factors import BlockShape, whole_blocks
from kfac.inverse.base import Inverse
from kfac.inverse.staleness import probes, relative_residual
from kfac.products import multiply


@dataclass(frozen=True)
class FactoredDamping(Inverse):
    """Precondition by (G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹ with stored inverses.

    Where one factor is the identity the other gets all of λ, which makes the damping exact. What
    remains to be said is how a dense matrix is inverted.
    """

    @property
    def damping_is_live(self) -> bool:
        """Whether a new λ takes effect at once rather than at the next refresh."""
        return False

    def state_shapes(self, block: BlockShape) -> dict[str, tuple[int, ...]]:
        """One inverse per factor, of the factor's shape."""
        return {f"{name}_inverse": shape for name, shape in block.factor_shapes().items()}

    def refresh(
        self,
        block: BlockShape,
        factors: Mapping[str, Tensor],
        damping: Tensor,
        previous: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Invert the damped factors."""
        state = {key: torch.zeros_like(tensor) for key, tensor in previous.items()}
        failed = torch.zeros_like(damping, dtype=torch.bool)
        for name, amount in _damping_amounts(block, factors, damping).items():
            matrix = damped(factors[name], amount)
            if matrix.dim() == 3:
                torch.reciprocal(matrix, out=state[f"{name}_inverse"])
                failed |= ~((matrix > 0) & matrix.isfinite()).flatten(1).all(1)
                continue
            rows = block.sizes()[name]
            parts = zip(
                whole_blocks(matrix, rows),
                _parts(previous, name, rows),
                _parts(state, name, rows),
                strict=True,
            )
            for matrices, last, target in parts:
                added = amount.unsqueeze(-1).expand(matrices.shape[:3])
                inverted, bad = self._invert(matrices, added, last)
                for key, tensor in inverted.items():
                    target[key].copy_(tensor)
                failed |= bad.flatten(1).any(1)
        return state, failed

    @abstractmethod
    def _invert(
        self, matrices: Tensor, amount: Tensor, previous: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Invert blocks of one of the two damped factors of every layer.

        Args:
            matrices: ``[layers, groups, blocks, d, d]``, symmetric positive definite.
            amount: What has been added to their diagonals ``[layers, groups, blocks]``.
            previous: The blocks' part of the state at the last refresh, the factor's name left out.

        Returns:
            The blocks' part of the state, ``"inverse"`` among it, and a boolean
            ``[layers, groups, blocks]``: which could not be inverted.
        """

    def staleness(
        self,
        block: BlockShape,
        factors: Mapping[str, Tensor],
        damping: Tensor,
        state: Mapping[str, Tensor],
    ) -> Tensor:
        """See :meth:`Inverse.staleness`; M is A + π√λ I and G + √λ/π I, with the λ of now."""
        found = []
        for name, amount in _damping_amounts(block, factors, damping).items():
            v = probes(factors[name], block.sizes()[name])
            solved = multiply(state[f"{name}_inverse"], v, None)
            found.append(relative_residual(factors[name], amount, solved, v))
        return torch.stack(found).amax(0)

    def precondition(
        self, state: Mapping[str, Tensor], gradient: Tensor, damping: Tensor
    ) -> Tensor:
        """Return G⁻¹ V A⁻¹ with the damped inverses of the last refresh."""
        return multiply(state.get("G_inverse"), gradient, state.get("A_inverse"))


def _damping_amounts(
    block: BlockShape, factors: Mapping[str, Tensor], damping: Tensor
) -> dict[str, Tensor]:
    if len(factors) == 2:
        on_a, on_g = factored_damping(factors["A"], factors["G"], damping, block.d_in, block.d_out)
        return {"A": on_a, "G": on_g}
    ((name, factor),) = factors.items()
    return {name: damping.unsqueeze(-1).expand(factor.shape[:2])}


def _parts(state: Mapping[str, Tensor], factor: str, rows: int) -> list[dict[str, Tensor]]:
    """A factor's part of a state, cut like its blocks: whatever there is one of for each."""
    own = {
        key.removeprefix(f"{factor}_"): tensor
        for key, tensor in state.items()
        if key.startswith(f"{factor}_")
    }
    like = own["inverse"]
    counts = [blocks.shape[2] for blocks in whole_blocks(like, rows)]
    cut = {
        key: whole_blocks(t, rows) if t.shape == like.shape else torch.split(t, counts, 2)
        for key, t in own.items()
    }
    return [{key: parts[i] for key, parts in cut.items()} for i in range(len(counts))]
