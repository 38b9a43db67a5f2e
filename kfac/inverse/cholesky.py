"""Factored damping: (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹ by Cholesky decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac.damping import damped, factored_damping
from kfac.factors import BlockShape
from kfac.inverse.base import Inverse, multiply
from kfac.inverse.decompose import inverse_by_cholesky, robustly


@dataclass(frozen=True)
class Cholesky(Inverse):
    """Precondition by (G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹ with stored inverses.

    Cheapest refresh and cheapest step. λ takes effect at the next refresh. Where one factor is the
    identity the other gets all of λ, which makes the damping exact.

    Cost:
        Refresh d³ per factor, step d_out·d_in·(d_out + d_in) per layer; memory as the factors.

    Source:
        Martens & Grosse 2015, sections 4.2 and 6.3.
    """

    @property
    def name(self) -> str:
        """The word for this strategy in ``inverse=`` and in checkpoints."""
        return "cholesky"

    @property
    def damping_is_live(self) -> bool:
        """Whether a new λ takes effect at once rather than at the next refresh."""
        return False

    def state_shapes(self, block: BlockShape) -> dict[str, tuple[int, ...]]:
        """One inverse per factor, of the factor's shape."""
        return {f"{name}_inverse": shape for name, shape in block.factor_shapes().items()}

    def refresh(
        self, factors: Mapping[str, Tensor], damping: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Invert the damped factors."""
        state, failed = {}, torch.zeros_like(damping, dtype=torch.bool)
        for name, amount in _damping_amounts(factors, damping).items():
            state[f"{name}_inverse"], bad = _invert(damped(factors[name], amount))
            failed |= bad.any(1)
        return state, failed

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


def _invert(factor: Tensor) -> tuple[Tensor, Tensor]:
    if factor.dim() == 3:
        return factor.reciprocal(), ~(factor > 0).all(-1)
    (inverse,), failed = robustly(inverse_by_cholesky, factor)
    return inverse, failed
