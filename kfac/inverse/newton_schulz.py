"""Factored damping by matrix products only: the Newton-Schulz iteration."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kfac.arguments import POSITIVE, POSITIVE_INTEGER, check
from kfac.factors import BlockShape
from kfac.inverse.decompose import inverse_by_cholesky, robustly
from kfac.inverse.factored import FactoredDamping

# Of a product M X whose eigenvalues lie in (0, 1]. At 2 an iteration would take the largest of them
# to nearly 0, and with it the digits of X in the directions of M's largest eigenvalues.
LARGEST_SCALE = 1.8


@dataclass(frozen=True)
class NewtonSchulz(FactoredDamping):
    """Precondition by (G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹, inverted by X ← X (2I − M X).

    The same step as ``"cholesky"`` but for rounding. M is a damped factor, δ what the damping has
    added to its diagonal, and c ≥ ‖M‖ the least of its trace, its Frobenius norm and its largest
    absolute row sum. X starts from x I with x = min(2/(c + δ), 1.8/c), where the spectral radius of
    R = I − M X is at most r = 1 − xδ, or from the last inverse where ‖R‖ is less. With R carried
    along,

        X ← s X (I + R),   R ← s R² + (1 − s) I,   s = min(2/(2 − r²), 1.8)

    takes r to 1 − s(1 − r²), which tells the number of iterations beforehand. In float32 the
    rounding of all of them is made up for at the end, from an I − M X in float64.

    Where ‖I − M X‖/√d then exceeds the tolerance, or c/δ the precision of the dtype from the start,
    the matrix is inverted by Cholesky decomposition, with its remedies. Products in reduced
    precision (TF32) get there at a c/δ of some hundreds.

    Usually slower than ``"cholesky"``. It is for devices without fast decompositions, and for
    refreshes so frequent that the last inverse is a start.

    Args:
        max_iterations: Upper limit to the iterations of a refresh.
        tolerance: Largest ‖I − M X‖/√d, in the Frobenius norm, at which X is accepted.

    Cost:
        Refresh two products of d × d matrices per factor and iteration, and five more of which one
        or two are in float64. About log(c/δ)/log(3.6) + 2 iterations from the identity, 1 to 4 from
        the last inverse, two more in float64. Two host-device synchronisations per bucket and
        factor. Step and memory as ``"cholesky"``.

    Source:
        Schulz 1933, "Iterative Berechnung der reziproken Matrix". The factor s: Pan & Schreiber
        1991, "An improved Newton iteration for the generalized inverse of a matrix, with
        applications". There R is computed anew in each iteration, and s may be 2.
    """

    max_iterations: int = 40
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check(owner, "max_iterations", self.max_iterations, POSITIVE_INTEGER, "The default is 40.")
        check(owner, "tolerance", self.tolerance, POSITIVE, "The default is 0.01.")

    @property
    def name(self) -> str:
        """The word for this strategy in ``inverse=`` and in checkpoints."""
        return "newton-schulz"

    def state_shapes(self, block: BlockShape) -> dict[str, tuple[int, ...]]:
        """One inverse per factor, and ‖I − M X‖ of each block (0: not found by products)."""
        residuals = {
            f"{name}_residual": (block.groups, prod(shape[1:-2]))
            for name, shape in block.factor_shapes().items()
            if len(shape) > 2
        }
        return super().state_shapes(block) | residuals

    def _invert(
        self, matrices: Tensor, amount: Tensor, previous: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        flat = _symmetric(matrices.flatten(0, 2))
        last, last_residual = (previous[key].flatten(0, 2) for key in ("inverse", "residual"))
        x, r, bound = _start(flat, amount.flatten(), last, last_residual)
        x = _refined(flat, _iterate(x, r, bound, self.max_iterations), bound > 0)
        # Of none at all, too, it is said that it was found by products.
        residual = _norm(_residual(flat, x)).clamp(min=torch.finfo(x.dtype).tiny)
        failed = ~(residual <= self.tolerance * flat.shape[-1] ** 0.5)
        if failed.any():
            undone = failed.clone()
            (x[undone],), failed[undone] = robustly(inverse_by_cholesky, flat[undone])
            residual[undone] = 0  # no start for the next refresh, which is to do the same
        state = {"inverse": x.view_as(matrices), "residual": residual.view_as(amount)}
        return state, failed.view_as(amount)


def norm_bound(matrices: Tensor) -> Tensor:
    """An upper bound ``[n]`` of the norms of positive definite matrices ``[n, d, d]``."""
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    rows = matrices.abs().sum(-1).amax(-1)
    rounding = 1 + matrices.shape[-1] * torch.finfo(matrices.dtype).eps
    return torch.stack([trace, _norm(matrices), rows]).amin(0) * rounding


def _start(
    matrices: Tensor, amount: Tensor, last: Tensor, last_residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where to start.

    Returns:
        X ``[n, d, d]``, R = I − M X there, and a bound on the spectral radius of R, ``[n]`` in
        float64 on the CPU. The bound is 0 where there is nothing to do: where the last inverse is
        as good as it was when it was made, and where there is no hope.
    """
    bound = norm_bound(matrices)
    measured = _norm(_residual(matrices, last))
    usable = last_residual > 0
    # For the same factors the last inverse has to come out again, bit for bit: a resumed run may
    # refresh where the uninterrupted one did not. Twice, because a product may round differently.
    kept = usable & (measured <= 2 * last_residual)
    figures = torch.stack([bound, amount, torch.where(usable, measured, 1.0), kept])
    largest, least, warm, is_kept = figures.cpu().double()
    start = torch.minimum(2 / (largest + least), LARGEST_SCALE / largest)
    cold = 1 - start * least
    is_kept = is_kept > 0
    is_warm = is_kept | (warm < cold)
    is_idle = is_kept | ~(cold < 1 - torch.finfo(matrices.dtype).eps)

    start = start.to(matrices)
    x = start.unsqueeze(-1).expand(matrices.shape[:2]).diag_embed()
    residual = -start.view(-1, 1, 1) * matrices
    residual.diagonal(dim1=-2, dim2=-1).add_(1)
    chosen = is_warm.nonzero().flatten().to(x.device)
    x[chosen] = last[chosen]
    chosen = (is_warm & ~is_idle).nonzero().flatten().to(x.device)
    residual[chosen] = _exact_residual(matrices[chosen], last[chosen])
    return x, residual, torch.where(is_idle, 0.0, torch.where(is_warm, warm, cold))


def _iterate(x: Tensor, residual: Tensor, bound: Tensor, max_iterations: int) -> Tensor:
    """Iterate each matrix as often as its bound wants, all that are not done at once.

    X ← s X (I + R) and R ← s R² + (1 − s) I. R could be computed anew from X; but then the rounding
    of M X would be multiplied by X, which costs as many digits again as c/δ has.
    """
    order = bound.argsort(descending=True, stable=True)
    bound, positions = bound[order], order.to(x.device)
    scales: list[Tensor] = []
    counts: list[int] = []
    target = torch.finfo(x.dtype).eps ** (0.25 if _has_refinement(x) else 1.0)
    while len(counts) < max_iterations and (active := int((bound > target).sum())):
        counts.append(active)
        least = 1 - bound.square()
        scales.append((2 / (1 + least)).clamp(max=LARGEST_SCALE))
        bound = 1 - scales[-1] * least
    if not counts:
        return x
    x, residual = x[positions], residual[positions]
    factors = torch.stack(scales).to(x)
    for count, next_count, factor in zip(counts, [*counts[1:], 0], factors, strict=True):
        scale = factor.view(-1, 1, 1)
        old = x[:count]
        old.copy_(torch.baddbmm(old, old, residual[:count]).mul_(scale[:count]))
        residual = residual[:next_count]
        residual = torch.bmm(residual, residual).mul_(scale[:next_count])
        residual.diagonal(dim1=-2, dim2=-1).add_(1 - factor[:next_count].unsqueeze(-1))
    return x[positions.argsort()]


def _refined(matrices: Tensor, inverses: Tensor, iterated: Tensor) -> Tensor:
    """Make up for the rounding of the iterations, where there is a higher precision: R ← R⁴.

    Args:
        matrices: M ``[n, d, d]``.
        inverses: X ``[n, d, d]``.
        iterated: Boolean ``[n]`` on the CPU; the others stay as they are.
    """
    chosen = iterated.nonzero().flatten().to(inverses.device)
    if not len(chosen):
        return inverses
    x = inverses[chosen]
    if _has_refinement(x):
        r = _exact_residual(matrices[chosen], x)
        x = torch.baddbmm(x, x, r)
        x = torch.baddbmm(x, x, r @ r)
    inverses[chosen] = _symmetric(x)
    return inverses


def _has_refinement(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.device.type != "mps"


def _residual(matrices: Tensor, inverses: Tensor) -> Tensor:
    """I − M X."""
    product = matrices @ inverses
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    return product.neg_()


def _exact_residual(matrices: Tensor, inverses: Tensor) -> Tensor:
    """I − M X from products in float64, where there is float64."""
    if matrices.device.type == "mps":
        return _residual(matrices, inverses)
    return _residual(matrices.double(), inverses.double()).to(matrices)


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norms ``[n]``."""
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2))
    return norms


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2
