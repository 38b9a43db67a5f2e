"""Factored damping without inverting anything: a root of the inverse follows the factors."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kfac.arguments import POSITIVE, POSITIVE_INTEGER, Constraint, check
from kfac.factors import BlockShape
from kfac.inverse.factored import FactoredDamping
from kfac.inverse.rotations import in_basis
from kfac.inverse.staleness import COLUMNS, probes
from kfac.products import multiply

STEP_SIZE = Constraint("a number in (0, 1]", lambda v: POSITIVE.accepts(v) and v <= 1)


@dataclass(frozen=True)
class InverseFree(FactoredDamping):
    """Precondition by (C Cᵀ) V (K Kᵀ), where K Kᵀ follows (A + π√λ I)⁻¹ by matrix products.

    With M = A + π√λ I a refresh makes a few updates

        K ← K (I − β/2 (H − I)),   H = Kᵀ M K,   β = min(step_size, 1/(c − 1)),   c ≈ ‖H‖,

    and likewise C for G + √λ/π I: nothing is decomposed, inverted or waited for, and whatever the
    rounding, K Kᵀ has no negative eigenvalue. At β = 1 an error E = H − I becomes −¾ E² + ¼ E³, so
    K Kᵀ converges to the inverse where the factors stay, and is off by the square of what they have
    moved where they move. Small eigenvalues of H grow 2.25-fold per update: directions in which M
    has become much smaller count as damped more strongly for a while. For large ones there is the
    bound on β; an update is stable where β (‖H‖ − 1) < 4.

    K starts from I/√c with c ≈ ‖M‖, and again wherever that is nearer. Damping below c ε/8, with ε
    the precision of the dtype, is raised to that: else the rounding of H would be inverted as well,
    and K grow without end.

    Args:
        iterations: Updates of K in a refresh.
        step_size: β in (0, 1]. Less than 1 makes the inverse a running average of its own.

    Cost:
        Refresh 3·iterations + 1 products of d × d matrices per factor, no host-device
        synchronisation. Step as ``"cholesky"``, memory twice that: K Kᵀ is kept beside K, since
        applying K and Kᵀ in turn would cost as much again in one step as it takes to make.

    Source:
        Lin et al. 2024, "Structured Inverse-Free Natural Gradient Descent: Memory-Efficient &
        Numerically-Stable KFAC", IKFAC: K ← K (I − β₁ m), m = ½ (Kᵀ U K + λ Kᵀ K − I), with the
        moment U of the last batch. Here A is the running average. Where K Kᵀ was the inverse of
        the old M, the batch has moved M by β₁ (U + π√λ I − M), so E is 2 β₁ m, and the update at
        β = 1 is theirs. It is not where it was not: theirs adds up what it neglects, this one makes
        up for it. It also follows λ and π, and any number of batches may lie between two refreshes.
        There is no momentum of m (INGD), and no structured K (SINGD) beyond the kinds of A and G.
    """

    iterations: int = 5
    step_size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check(owner, "iterations", self.iterations, POSITIVE_INTEGER, "The default is 5.")
        check(owner, "step_size", self.step_size, STEP_SIZE, "The default is 1.")

    @property
    def name(self) -> str:
        """The word for this strategy in ``inverse=`` and in checkpoints."""
        return "inverse-free"

    def state_shapes(self, block: BlockShape) -> dict[str, tuple[int, ...]]:
        """K Kᵀ of each factor, and of those that are not diagonal K and a sketch of M."""
        shapes = super().state_shapes(block)
        for name, shape in block.factor_shapes().items():
            if len(shape) > 2:
                shapes[f"{name}_root"] = shape
                shapes[f"{name}_sketch"] = (block.groups, prod(shape[1:-2]), COLUMNS + 1)
        return shapes

    def _invert(
        self, matrices: Tensor, amount: Tensor, previous: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        last = {key: tensor.flatten(0, 2) for key, tensor in previous.items()}
        added = amount.flatten()
        flat = _representable(matrices.flatten(0, 2), added)
        root, whitened = _start(flat, last["root"])
        root = _updated(root, whitened, self.step_size)
        for _ in range(self.iterations - 1):
            root = _updated(root, in_basis(flat, root), self.step_size)
        new = {"root": root, "sketch": _sketch(flat, added), "inverse": _product(root, root.mT)}
        kept = _same(new["sketch"], last["sketch"])
        state = {key: torch.where(_like(kept, t), last[key], t) for key, t in new.items()}
        failed = ~state["inverse"].flatten(1).sum(1).isfinite()
        return {k: t.view_as(previous[k]) for k, t in state.items()}, failed.view_as(amount)


def norm_estimate(matrices: Tensor) -> Tensor:
    """About (tr M⁸)^(1/8) ``[n]``, between ‖M‖ and d^(1/8) ‖M‖, of matrices ``[n, d, d]``.

    From ‖M⁴ V‖ for eight random directions V. Less than 0.6 ‖M‖ once in 10⁶ cases.

    Args:
        matrices: Symmetric, positive semi-definite, not zero.

    Cost:
        32 d² multiply-adds.
    """
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    v = image = _probes(matrices)
    for _ in range(_POWER):
        image = matrices @ image / _like(trace, image)  # without the trace, powers may overflow
    after, before = (torch.linalg.vector_norm(t, dim=(1, 2)) for t in (image, v))
    norm: Tensor = trace * (after / before * matrices.shape[-1] ** 0.5) ** (1 / _POWER)
    return norm


_POWER = 4


def _representable(matrices: Tensor, amount: Tensor) -> Tensor:
    """Damped matrices, damped more where the damping is lost in the rounding of Kᵀ M K."""
    least = norm_estimate(matrices) * (torch.finfo(matrices.dtype).eps / 8)
    added = (least - amount).clamp(min=0)
    return matrices + added.unsqueeze(-1).expand(matrices.shape[:2]).diag_embed()


def _start(matrices: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Where to start: from the last K, or from a multiple of the identity if that is nearer.

    Returns:
        K ``[n, d, d]`` and Kᵀ M K.
    """
    square = 1 / norm_estimate(matrices)
    cold = square.sqrt().unsqueeze(-1).expand(matrices.shape[:2]).diag_embed()
    cold_whitened = _like(square, matrices) * matrices
    warm_whitened = in_basis(matrices, last)
    # Zeros are not nearer, nor is what is not finite.
    is_warm = _like(_error(warm_whitened) < _error(cold_whitened), matrices)
    return torch.where(is_warm, last, cold), torch.where(is_warm, warm_whitened, cold_whitened)


def _updated(root: Tensor, whitened: Tensor, step_size: float) -> Tensor:
    """K (I − β/2 (H − I)) for H = Kᵀ M K."""
    step = step_size / (step_size * (norm_estimate(whitened) - 1)).clamp(min=1)
    change = _like(step / -2, whitened) * whitened
    change.diagonal(dim1=-2, dim2=-1).add_(1 + step.unsqueeze(-1) / 2)
    return _product(root, change)


def _error(whitened: Tensor) -> Tensor:
    """‖H − I‖ ``[n]`` in the Frobenius norm."""
    eye = torch.eye(whitened.shape[-1], dtype=whitened.dtype, device=whitened.device)
    error: Tensor = torch.linalg.vector_norm(whitened - eye, dim=(1, 2))
    return error


def _sketch(matrices: Tensor, amount: Tensor) -> Tensor:
    """‖M v‖ for eight random v, and the damping: by them M is recognised, ``[n, 9]``."""
    images = matrices @ _probes(matrices)
    largest = images.abs().amax(1, keepdim=True).clamp(min=torch.finfo(images.dtype).tiny)
    # The squares of large elements may overflow, or those of small ones vanish.
    norms = torch.linalg.vector_norm(images / largest, dim=1) * largest.squeeze(1)
    return torch.cat([norms, amount.unsqueeze(-1)], dim=1)


def _same(sketch: Tensor, last: Tensor) -> Tensor:
    """Whether two sketches are of the same matrix but for rounding, ``[n]``.

    For the same factors the last inverse has to stay, bit for bit: a resumed run may refresh where
    the uninterrupted one did not.
    """
    rounding = 4 * torch.finfo(sketch.dtype).eps
    return ((sketch - last).abs() <= rounding * sketch).all(1)


def _probes(matrices: Tensor) -> Tensor:
    return probes(matrices.unsqueeze(1), matrices.shape[-1]).squeeze(1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return multiply(left.unsqueeze(1), right.unsqueeze(1), None).squeeze(1)


def _like(vector: Tensor, target: Tensor) -> Tensor:
    """View ``[n]`` so that it broadcasts along the first axis of ``target``."""
    return vector.view(-1, *[1] * (target.dim() - 1))
