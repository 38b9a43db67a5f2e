"""Factored damping: (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹, however they are computed."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac.damping import damped, factored_damping
from kfac.factors import BlockShape
from kfac.inverse.base import Inverse, multiply


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
        self, factors: Mapping[str, Tensor], damping: Tensor, previous: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Invert the damped factors."""
        state: dict[str, Tensor] = {}
        failed = torch.zeros_like(damping, dtype=torch.bool)
        for name, amount in _damping_amounts(factors, damping).items():
            matrix = damped(factors[name], amount)
            if matrix.dim() == 3:
                inverted, bad = {"inverse": matrix.reciprocal()}, ~(matrix > 0).all(-1)
            else:
                own = {
                    key.removeprefix(f"{name}_"): tensor
                    for key, tensor in previous.items()
                    if key.startswith(f"{name}_")
                }
                inverted, bad = self._invert(matrix, amount, own)
            state |= {f"{name}_{key}": tensor for key, tensor in inverted.items()}
            failed |= bad.any(1)
        return state, failed

    @abstractmethod
    def _invert(
        self, matrix: Tensor, amount: Tensor, previous: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Invert one of the two damped factors of every layer.

        Args:
            matrix: ``[layers, groups, d, d]``, symmetric positive definite.
            amount: What has been added to its diagonal ``[layers, groups]``.
            previous: The factor's part of the state at the last refresh, its name left out.

        Returns:
            The factor's part of the state, ``"inverse"`` among it, and a boolean
            ``[layers, groups]``: which could not be inverted.
        """

    def precondition(
        self, state: Mapping[str, Tensor], gradient: Tensor, damping: Tensor
    ) -> Tensor:
        """Return G⁻¹ V A⁻¹ with the damped inverses of the last refresh."""
        return multiply(state.get("G_inverse"), gradient, state.get("A_inverse"))


def _damping_amounts(factors: Mapping[str, Tensor], damping: Tensor) -> dict[str, Tensor]:
    if len(factors) == 2:
        on_a, on_g = factored_damping(factors["A"], factors["G"], damping)
        return {"A": on_a, "G": on_g}
    ((name, factor),) = factors.items()
    return {name: damping.unsqueeze(-1).expand(factor.shape[:2])}
