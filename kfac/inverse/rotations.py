"""Eigenbases that follow matrices which move little, by Jacobi rotations of all pairs at once.

From a basis Q, B = Qᵀ A Q is nearly diagonal. Every pair of basis vectors is turned by the angle at
which its own off-diagonal element would vanish if it were alone, all pairs together,

    X = Q (I + T),   tᵢⱼ = tan θᵢⱼ,   tan 2θᵢⱼ = 2 bᵢⱼ/(bⱼⱼ − bᵢᵢ),   |θᵢⱼ| ≤ π/4,

and X is made orthogonal again by its QR decomposition, with the Cholesky factor of XᵀX as R: XᵀX is
I − T² but for rounding, so well conditioned. Where the eigenvalues are further apart than the
off-diagonal elements are large, this is the first-order correction and squares the error; where
they are not, it still converges.
"""

import torch
from torch import Tensor

from kfac.products import multiply


def in_basis(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Qᵀ A Q ``[n, d, d]``, symmetric to the last bit."""
    q = vectors.unsqueeze(1)
    rotated = multiply(q.mT, matrices.unsqueeze(1), q).squeeze(1)
    return (rotated + rotated.mT) / 2


def misfit(rotated: Tensor, values: Tensor, floor: Tensor) -> Tensor:
    """‖D^(−1/2) (B − diag(values)) D^(−1/2)‖/√d with D = diag(values) + floor, Frobenius norm.

    To first order the relative error that diag(values) in place of B makes in what
    (B + floor·I)⁻¹ is applied to, root mean square over directions.

    Args:
        rotated: B ``[n, d, d]``, symmetric.
        values: ``[n, d]``, not negative.
        floor: ``[n]``, positive.

    Returns:
        ``[n]``.
    """
    root = (values + floor.unsqueeze(-1)).rsqrt()
    scaled = (rotated - values.diag_embed()) * root.unsqueeze(-1) * root.unsqueeze(-2)
    error: Tensor = torch.linalg.vector_norm(scaled, dim=(1, 2)) / values.shape[-1] ** 0.5
    return error


def tangents(rotated: Tensor) -> Tensor:
    """T ``[n, d, d]``, skew: the tangents of the angles at which the elements of B vanish.

    Args:
        rotated: B ``[n, d, d]``, symmetric.

    Source:
        Golub & Van Loan 2013, "Matrix Computations", section 8.5.2, for a single pair.
    """
    values = rotated.diagonal(dim1=-2, dim2=-1)
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    twice = 2 * rotated
    divisors = gaps + torch.hypot(gaps, twice).copysign(gaps)
    upper = torch.where(divisors == 0, 0.0, twice / divisors).triu(1)
    return upper - upper.mT


def turned(vectors: Tensor, rotated: Tensor) -> Tensor:
    """The basis Q ``[n, d, d]`` after one rotation of all pairs; NaN where there is none."""
    x = torch.baddbmm(vectors, vectors, tangents(rotated))
    triangles, info = torch.linalg.cholesky_ex(x.mT @ x, upper=True)
    x = torch.linalg.solve_triangular(triangles, x, upper=True, left=False)
    return torch.where((info == 0).view(-1, 1, 1), x, float("nan"))


def follow(
    matrices: Tensor,
    values: Tensor,
    vectors: Tensor,
    floor: Tensor,
    tolerance: float,
    max_rotations: int,
) -> Tensor:
    """Take eigenvalues and eigenvectors along to matrices that have moved, in place.

    A decomposition that is still within the tolerance stays as it is, bit for bit. Of the others
    those are done whose misfit becomes less than half of it, and it has to become less by a quarter
    in each rotation.

    Args:
        matrices: A ``[n, d, d]``, symmetric.
        values: The eigenvalues at first ``[n, d]``.
        vectors: The eigenvectors at first ``[n, d, d]``.
        floor: See :func:`misfit`.
        tolerance: Largest misfit of an eigendecomposition that is kept.
        max_rotations: Upper limit to the rotations.

    Returns:
        Boolean ``[n]``: whose decompositions are within the tolerance. The others are spoilt.

    Cost:
        Two products of d × d matrices, and for each rotation another five, a Cholesky
        decomposition and a triangular solve. Waits for the device once per rotation.
    """
    rotated = in_basis(matrices, vectors)
    done = misfit(rotated, values, floor) <= tolerance
    active = (~done).nonzero().flatten()
    rotated, bound = rotated[active], matrices.new_full((len(active),), float("inf"))
    for left in reversed(range(max_rotations + 1)):
        values[active] = rotated.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        found = misfit(rotated, values[active], floor[active])
        done[active] = found <= tolerance / 2
        going = ~done[active] & (found <= bound)
        active, rotated, bound = active[going], rotated[going], _SLOWEST * found[going]
        if not len(active) or not left:
            break
        vectors[active] = turned(vectors[active], rotated)
        rotated = in_basis(matrices[active], vectors[active])
    return done


# What a rotation has to leave of the misfit at most. Slower ones take longer than a decomposition.
_SLOWEST = 0.75
