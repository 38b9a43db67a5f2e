"""Factored damping by Cholesky decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kfac.inverse.decompose import inverse_by_cholesky, robustly
from kfac.inverse.factored import FactoredDamping


@dataclass(frozen=True)
class Cholesky(FactoredDamping):
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

    def _invert(
        self, matrices: Tensor, amount: Tensor, previous: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        (inverse,), failed = robustly(inverse_by_cholesky, matrices)
        return {"inverse": inverse}, failed
