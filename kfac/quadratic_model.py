"""The quadratic model of the objective on the span of a few directions, and its minimum.

    M(δ) = ½ δᵀ(F + (λ + η)I)δ + ∇hᵀδ + h(θ),      δ = Σᵢ cᵢ dᵢ

With the preconditioned gradient as one direction and the last step as another, the minimising
coefficients are the learning rate (with a minus sign) and the momentum of the step.

Source:
    Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", sections 6.4 and 7.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

# Relative size below which a curvature is that of rounding errors in float32 inner products.
TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """M(Σ cᵢ dᵢ) − h(θ) = ½ cᵀ K c + sᵀc as a function of the coefficients c.

    Attributes:
        curvature: K with K_ij = dᵢᵀ(F + (λ + η)I)dⱼ ``[n, n]``, float64.
        slopes: s with sᵢ = ∇hᵀdᵢ ``[n]``, float64.
    """

    curvature: Tensor
    slopes: Tensor

    def minimizer(
        self, fixed: Sequence[float | None] = (), *, tolerance: float = TOLERANCE
    ) -> Tensor:
        """Coefficients at which the model is smallest.

            K_ff c_f = −(s_f + K_fx c_x)

        for the free coefficients f and the fixed ones x. Where the free directions depend on each
        other (parallel ones, or zero ones such as the step before the first) the solution of least
        norm is taken, in units in which every direction has curvature one.

        Args:
            fixed: The value of each coefficient that is given, None for a free one; all are free by
                default.
            tolerance: Eigenvalues of K_ff, scaled to a diagonal of ones, count as zero below this
                times the largest.

        Returns:
            c ``[n]``, float64. Free coefficients are zero where K or s is not finite.

        Cost:
            Waits for the device, if K is not on the CPU.

        Source:
            Martens & Grosse 2015, section 7.
        """
        fixed = list(fixed) or [None] * len(self.slopes)
        free = [i for i, value in enumerate(fixed) if value is None]
        coefficients = self.slopes.new_tensor([value or 0.0 for value in fixed])
        if free:
            slopes = (self.slopes + self.curvature @ coefficients)[free]
            curvature = self.curvature[free][:, free]
            coefficients[free] = -_solve(curvature, slopes, tolerance)
        return coefficients

    def change(self, coefficients: Tensor) -> Tensor:
        """M(δ) − h(θ), a scalar: the predicted change of the objective, ≤ 0 at the minimum.

        Args:
            coefficients: c ``[n]``.
        """
        c = coefficients.to(self.slopes)
        return 0.5 * c @ self.curvature @ c + self.slopes @ c


def quadratic_model(
    fisher: Tensor,
    directions: Sequence[Sequence[Tensor]],
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    damping: Sequence[float],
    weight_decay: Sequence[float],
) -> QuadraticModel:
    """The model of the objective h(θ) = L(θ) + ½ Σ η θ².

        K_ij = dᵢᵀ F dⱼ + Σ (λ + η) dᵢ dⱼ,   sᵢ = Σ (∇L + η θ) dᵢ

    The curvature η of the weight decay is exact; only the damping λ is a matter of trust.

    Args:
        fisher: dᵢᵀ F dⱼ of the mean loss ``[n, n]``, see :mod:`kfac.fisher_products`.
        directions: n directions dᵢ, each a tensor for every parameter.
        gradients: ∇L of the mean loss for every parameter.
        parameters: θ.
        damping: λ of every parameter.
        weight_decay: η of every parameter.

    Source:
        Martens & Grosse 2015, sections 6.1 and 6.4.
    """
    total = [d + w for d, w in zip(damping, weight_decay, strict=True)]
    curvature = fisher.double() + inner_products(directions, directions, total).to(fisher.device)
    ones = [1.0] * len(parameters)
    slopes = inner_products(directions, [gradients], ones)
    slopes = slopes + inner_products(directions, [parameters], weight_decay)
    return QuadraticModel(curvature, slopes[:, 0].to(fisher.device))


def inner_products(
    left: Sequence[Sequence[Tensor]],
    right: Sequence[Sequence[Tensor]],
    weights: Sequence[float],
) -> Tensor:
    """Σ w ⟨aᵢ, bⱼ⟩ over the tensors that make up each vector.

    Args:
        left: n vectors a, each a list of tensors.
        right: m vectors b, likewise.
        weights: w of every tensor.

    Returns:
        ``[n, m]`` in float64; products are taken in the tensors' own dtype, or float32.
    """
    groups: dict[tuple[float, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, (weight, tensor) in enumerate(zip(weights, left[0], strict=True)):
        if weight:
            groups[weight, tensor.dtype, tensor.device].append(index)
    device = left[0][0].device
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=device)
    for (weight, _, _), members in groups.items():
        a = [_pieces(vector, members) for vector in left]
        b = a if right is left else [_pieces(vector, members) for vector in right]
        for i, j in product(range(len(a)), range(len(b))):
            if right is left and j < i:
                total[i, j] = total[j, i]
            else:
                total[i, j] += weight * _inner_product(a[i], b[j]).to(device)
    return total


def _pieces(vector: Sequence[Tensor], members: Sequence[int]) -> list[Tensor]:
    """Some tensors of a vector, flat, in float32 or better."""
    flat = [vector[i].flatten() for i in members]
    if flat[0].device.type != "cpu":
        flat = [torch.cat(flat)]  # there, a copy costs less than many small operations
    precise = torch.promote_types(flat[0].dtype, torch.float32)
    return [piece.to(precise) for piece in flat]


def _inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    pairs = zip(left, right, strict=True)
    return torch.stack([torch.dot(a, b.to(a)) for a, b in pairs]).double().sum()


def _solve(matrix: Tensor, right: Tensor, tolerance: float) -> Tensor:
    """x of least norm in M x = r, M symmetric and semidefinite, scaled to a diagonal of ones."""
    finite = matrix.isfinite().all() & right.isfinite().all()
    matrix = torch.where(finite, matrix, torch.zeros_like(matrix))
    scale = matrix.diagonal().clamp(min=0).rsqrt()
    scale = torch.where(scale.isfinite(), scale, torch.zeros_like(scale))
    eigenvalues, basis = torch.linalg.eigh(scale[:, None] * matrix * scale)
    kept = eigenvalues > tolerance * eigenvalues[-1]
    inverse = torch.where(kept, eigenvalues.reciprocal(), torch.zeros_like(eigenvalues))
    right = torch.where(finite, scale * right, torch.zeros_like(right))
    solution: Tensor = basis @ (inverse * (basis.mT @ right))
    return scale * solution
