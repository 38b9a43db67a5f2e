"""Exact damping: (A ⊗ G + λI)⁻¹ in the joint eigenbasis."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac.factors import BlockShape
from kfac.inverse.base import Inverse, multiply
from kfac.inverse.decompose import eigenbasis, robustly


@dataclass(frozen=True)
class Eigen(Inverse):
    """Precondition by Q_G [(Q_Gᵀ V Q_A) / (λ_G λ_Aᵀ + λ)] Q_Aᵀ.

    Damps exactly, and λ takes effect at every step without a refresh. The decomposition costs
    several times that of ``"cholesky"``, the step twice as many matrix products.

    Cost:
        Refresh O(d³) per factor, step 2·d_out·d_in·(d_out + d_in) per layer; memory as the
        factors.

    Source:
        Martens & Grosse 2015, section 4.2 and appendix B (inverse of a sum of Kronecker products).
    """

    @property
    def name(self) -> str:
        """The word for this strategy in ``inverse=`` and in checkpoints."""
        return "eigen"

    @property
    def damping_is_live(self) -> bool:
        """Whether a new λ takes effect at once rather than at the next refresh."""
        return True

    def state_shapes(self, block: BlockShape) -> dict[str, tuple[int, ...]]:
        """Eigenvalues of each factor, and eigenvectors of each dense factor."""
        shapes = {}
        for name, shape in block.factor_shapes().items():
            shapes[f"{name}_eigenvalues"] = shape[:2]
            if len(shape) == 3:
                shapes[f"{name}_eigenvectors"] = shape
        return shapes

    def refresh(
        self, factors: Mapping[str, Tensor], damping: Tensor, previous: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Decompose both factors."""
        state, failed = {}, torch.zeros_like(damping, dtype=torch.bool)
        for name, factor in factors.items():
            if factor.dim() == 3:
                state[f"{name}_eigenvalues"] = factor.clamp(min=0)
                continue
            (values, vectors), bad = robustly(eigenbasis, factor)
            state[f"{name}_eigenvalues"], state[f"{name}_eigenvectors"] = values, vectors
            failed |= bad.any(1)
        return state, failed

    def precondition(
        self, state: Mapping[str, Tensor], gradient: Tensor, damping: Tensor
    ) -> Tensor:
        """Divide by the damped eigenvalues in the joint eigenbasis."""
        return divide(gradient, self.eigenvalues(state) + damping.view(-1, 1, 1, 1), state)

    def eigenvalues(self, state: Mapping[str, Tensor]) -> Tensor:
        """λ_G λ_Aᵀ, broadcastable to ``[layers, groups, d_out, d_in]``."""
        return joint_eigenvalues(state)


def divide(gradient: Tensor, divisor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Q_G [(Q_Gᵀ V Q_A) / divisor] Q_Aᵀ."""
    q_a, q_g = state.get("A_eigenvectors"), state.get("G_eigenvectors")
    rotated = multiply(None if q_g is None else q_g.mT, gradient, q_a) / divisor
    return multiply(q_g, rotated, None if q_a is None else q_a.mT)


def joint_eigenvalues(state: Mapping[str, Tensor]) -> Tensor:
    """λ_G λ_Aᵀ, broadcastable to ``[layers, groups, d_out, d_in]``."""
    on_inputs, on_outputs = state.get("A_eigenvalues"), state.get("G_eigenvalues")
    if on_inputs is None:
        assert on_outputs is not None
        return on_outputs.unsqueeze(-1)
    row = on_inputs.unsqueeze(-2)
    return row if on_outputs is None else on_outputs.unsqueeze(-1) * row
