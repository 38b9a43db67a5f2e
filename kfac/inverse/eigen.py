"""Exact damping: (A ⊗ G + λI)⁻¹ in the joint eigenbasis."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kfac.arguments import BOOLEAN, POSITIVE, POSITIVE_INTEGER, check
from kfac.factors import BlockShape, whole_blocks
from kfac.inverse.base import Inverse
from kfac.inverse.decompose import eigenbasis, robustly
from kfac.inverse.rotations import follow, in_basis, misfit
from kfac.inverse.staleness import probes, relative_residual
from kfac.products import multiply


@dataclass(frozen=True)
class Eigen(Inverse):
    """Precondition by Q_G [(Q_Gᵀ V Q_A) / (λ_G λ_Aᵀ + λ)] Q_Aᵀ.

    Damps exactly, and λ takes effect at every step without a refresh. The decomposition costs
    several times that of ``"cholesky"``, the step twice as many matrix products.

    With ``warm_start`` the last eigenbasis is the start of a refresh, and decompositions are for
    factors that have moved too far from it. With B = Qᵀ A Q, what is wrong with a basis Q and
    eigenvalues Λ is measured by

        ε = ‖D^(−1/2) (B − Λ) D^(−1/2)‖/√d,   D = Λ + (λ/‖G‖) I,

    in the Frobenius norm, and likewise for G; without G it is λ itself. To first order the
    preconditioned gradient is off by ε_A + ε_G of its size, for the λ of the refresh and root mean
    square over directions; √(d_in) ε_A + √(d_out) ε_G bounds it for all. Q and Λ stay as they are
    where ε is within the tolerance. Else Λ becomes the diagonal of B and Q is rotated
    (:mod:`kfac.inverse.rotations`) until ε is less than half of it. Where that does not get
    anywhere, the factor is decomposed. Eigenvalues are then in no particular order.

    Args:
        warm_start: Start from the last eigenbasis.
        tolerance: Largest ε at which a decomposition is kept; not used without ``warm_start``.
        max_rotations: Upper limit to the rotations of a refresh; likewise.

    Cost:
        Refresh O(d³) per factor, step 2·d_out·d_in·(d_out + d_in) per layer; memory as the
        factors. With ``warm_start`` two products of d × d matrices to measure ε, and five, a
        Cholesky decomposition and a triangular solve for each rotation, which waits for the device.

    Source:
        Martens & Grosse 2015, section 4.2 and appendix B (inverse of a sum of Kronecker products).
    """

    warm_start: bool = False
    tolerance: float = 0.02
    max_rotations: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check(owner, "warm_start", self.warm_start, BOOLEAN, "The default is False.")
        check(owner, "tolerance", self.tolerance, POSITIVE, "The default is 0.02.")
        check(owner, "max_rotations", self.max_rotations, POSITIVE_INTEGER, "The default is 8.")

    @property
    def name(self) -> str:
        """The word for this strategy in ``inverse=`` and in checkpoints."""
        return "eigen"

    @property
    def damping_is_live(self) -> bool:
        """Whether a new λ takes effect at once rather than at the next refresh."""
        return True

    def state_shapes(self, block: BlockShape) -> dict[str, tuple[int, ...]]:
        """Eigenvalues of each factor, eigenvectors of each that is not diagonal.

        And with ``warm_start`` whether each block of those is a start for the next refresh (1).
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in block.factor_shapes().items():
            shapes[f"{name}_eigenvalues"] = (block.groups, block.sizes()[name])
            if len(shape) > 2:
                shapes[f"{name}_eigenvectors"] = shape
                if self.warm_start:
                    shapes[f"{name}_is_start"] = (block.groups, prod(shape[1:-2]))
        return shapes

    def refresh(
        self,
        block: BlockShape,
        factors: Mapping[str, Tensor],
        damping: Tensor,
        previous: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Decompose both factors."""
        failed = torch.zeros_like(damping, dtype=torch.bool)
        if self.warm_start:
            state = {key: tensor.clone() for key, tensor in previous.items()}
        else:
            shapes = self.state_shapes(block)
            state = {key: damping.new_zeros(len(damping), *shapes[key]) for key in shapes}
        floors = _floors(factors, damping)
        for name, factor in factors.items():
            if factor.dim() == 3:
                state[f"{name}_eigenvalues"] = factor.clamp(min=0)
                failed |= ~factor.isfinite().flatten(1).all(1)
                continue
            rows = block.sizes()[name]
            parts = zip(whole_blocks(factor, rows), _parts(state, name, rows), strict=True)
            for matrices, part in parts:
                floor = floors[name].unsqueeze(-1).expand(matrices.shape[:3])
                failed |= self._decompose(matrices, floor, part).flatten(1).any(1)
        return state, failed

    def _decompose(self, matrices: Tensor, floor: Tensor, part: Mapping[str, Tensor]) -> Tensor:
        """Decompose blocks of a factor of every layer.

        Args:
            matrices: ``[layers, groups, blocks, d, d]``.
            floor: What the damping comes to for this factor at least ``[layers, groups, blocks]``.
            part: The blocks' part of the last state, which is overwritten.

        Returns:
            Boolean ``[layers, groups, blocks]``: which could not be decomposed.
        """
        if not self.warm_start:
            (values, vectors), failed = robustly(eigenbasis, matrices)
            part["eigenvalues"].copy_(values)
            part["eigenvectors"].copy_(vectors)
            return failed
        flat = matrices.flatten(0, 2)
        found = self._follow(flat, floor.flatten(), {k: t.flatten(0, 2) for k, t in part.items()})
        for key, tensor in part.items():
            tensor.copy_(found[key].view_as(tensor))
        return found["failed"].view_as(floor)

    def _follow(
        self, matrices: Tensor, floor: Tensor, last: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Decompose matrices ``[n, d, d]``, from their last decompositions where that is less."""
        values, vectors = last["eigenvalues"].clone(), last["eigenvectors"].clone()
        undone = torch.ones_like(floor, dtype=torch.bool)
        starts = last["is_start"].nonzero().flatten()
        if len(starts):
            some_values, some_vectors = values[starts], vectors[starts]
            undone[starts] = ~follow(
                matrices[starts], some_values, some_vectors, floor[starts],
                self.tolerance, self.max_rotations,
            )  # fmt: skip
            values[starts], vectors[starts] = some_values, some_vectors
        failed, is_start = torch.zeros_like(undone), (~undone).to(floor)
        if undone.any():
            (values[undone], vectors[undone]), failed[undone] = robustly(
                eigenbasis, matrices[undone]
            )
            # A refresh for the same factors has to change nothing, bit for bit: what is not well
            # within the tolerance by rounding alone is decomposed again.
            error = misfit(
                in_basis(matrices[undone], vectors[undone]), values[undone], floor[undone]
            )
            is_start[undone] = (error <= self.tolerance / 2).to(is_start)
        return {
            "eigenvalues": values, "eigenvectors": vectors, "is_start": is_start, "failed": failed
        }  # fmt: skip

    def staleness(
        self,
        block: BlockShape,
        factors: Mapping[str, Tensor],
        damping: Tensor,
        state: Mapping[str, Tensor],
    ) -> Tensor:
        """See :meth:`Inverse.staleness`; M is A + (λ/‖G‖) I and likewise for G."""
        found = []
        for name, amount in _floors(factors, damping).items():
            factor, vectors = factors[name], state.get(f"{name}_eigenvectors")
            v = probes(factor, block.sizes()[name])
            divisor = (state[f"{name}_eigenvalues"] + amount.unsqueeze(-1)).unsqueeze(-1)
            rotated = multiply(None if vectors is None else vectors.mT, v, None) / divisor
            solved = multiply(vectors, rotated, None)
            found.append(relative_residual(factor, amount, solved, v))
        return torch.stack(found).amax(0)

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


def _floors(factors: Mapping[str, Tensor], damping: Tensor) -> dict[str, Tensor]:
    """The least that λ in A ⊗ G + λI comes to for each factor: λ/‖G‖ for A ``[layers, groups]``."""
    floors = {}
    for name, factor in factors.items():
        floors[name] = damping.unsqueeze(-1).expand(factor.shape[:2])
        other = factors.get("G" if name == "A" else "A")
        if other is not None:
            norm = torch.linalg.vector_norm(other.flatten(2), dim=2)
            floors[name] = floors[name] / norm.clamp(min=_SMALL)
    return floors


# Of a norm that is divided by.
_SMALL = 1e-30


def _parts(state: Mapping[str, Tensor], factor: str, rows: int) -> list[dict[str, Tensor]]:
    """A factor's part of a state as views, cut like its blocks."""
    vectors = whole_blocks(state[f"{factor}_eigenvectors"], rows)
    shapes = [blocks.shape[2:4] for blocks in vectors]
    values = torch.split(state[f"{factor}_eigenvalues"], [n * d for n, d in shapes], 2)
    parts = [
        {"eigenvectors": q, "eigenvalues": v.view(*v.shape[:2], *shape)}
        for q, v, shape in zip(vectors, values, shapes, strict=True)
    ]
    if f"{factor}_is_start" in state:
        starts = torch.split(state[f"{factor}_is_start"], [n for n, _ in shapes], 2)
        for part, is_start in zip(parts, starts, strict=True):
            part["is_start"] = is_start
    return parts
