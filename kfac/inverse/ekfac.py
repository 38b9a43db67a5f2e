"""Exact damping with eigenvalues that are measured in the Kronecker-factored eigenbasis."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kfac.factors import BlockShape
from kfac.inverse.eigen import Eigen, joint_eigenvalues
from kfac.products import multiply


@dataclass(frozen=True)
class Ekfac(Eigen):
    """Precondition by Q_G [(Q_Gᵀ V Q_A) / (S + λ)] Q_Aᵀ with measured S in place of λ_G λ_Aᵀ.

    S is the second moment of the per-example gradients along the eigenvectors of A ⊗ G, which makes
    Q diag(S) Qᵀ the matrix in that basis that is nearest to the Fisher; K-FAC's own eigenvalues
    assume that inputs and output gradients are independent.

    S is a running average like A and G, and takes effect at every step. A batch's gradients are
    rotated into the basis of the last refresh. A refresh takes the average along to the new basis:
    what F would have on its diagonal there if it were Q diag(S) Qᵀ. The batch that the first basis
    is made of has been seen by then; its share of the average is λ_G λ_Aᵀ.

    Where eigenvalues of A or of G coincide, as the zeros of a factor of low rank do, their
    eigenvectors are not unique and neither is S: libraries may differ in the step.

    Cost:
        That of ``"eigen"``, and per factor update one per-example gradient for every example, layer
        by layer and some at a time; memory of S as the parameters, twice.

    Source:
        George et al. 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
        Eigenbasis". There S is measured anew on one more batch after every refresh.
    """

    has_second_moments = True

    @property
    def name(self) -> str:
        """The word for this strategy in ``inverse=`` and in checkpoints."""
        return "ekfac"

    def first_second_moments(self, state: Mapping[str, Tensor], block: BlockShape) -> Tensor:
        """S before any was measured: λ_G λ_Aᵀ, ``[layers, groups, d_out, d_in]``."""
        values = joint_eigenvalues(state)
        return values.expand(*values.shape[:2], block.d_out, block.d_in)

    def moved_second_moments(
        self, moments: Tensor, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
    ) -> Tensor:
        """The diagonal of Q diag(S) Qᵀ in another basis: S times squared overlaps on both sides.

        Args:
            moments: S ``[layers, groups, d_out, d_in]`` in the old basis.
            old: State with the old basis.
            new: State with the new one.
        """
        return multiply(
            _overlaps(new, old, "G_eigenvectors"), moments, _overlaps(old, new, "A_eigenvectors")
        )

    def eigenvalues(self, state: Mapping[str, Tensor]) -> Tensor:
        """S, which the running averages hold."""
        return state["S"]


def _overlaps(rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], key: str) -> Tensor | None:
    """Squared inner products of the vectors of two bases, None where both are the unit vectors."""
    if key not in rows:
        return None
    return (rows[key].mT @ columns[key]).square()
