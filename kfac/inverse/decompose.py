"""Decompositions of stacked symmetric matrices that survive bad matrices.

A matrix that a routine cannot decompose is tried again by itself: with jitter on its diagonal,
then in float64, then in float64 on the CPU. What still fails is reported, never raised, so that
the caller can keep its last good result.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

# A decomposition: matrices [n, d, d] -> results (each [n, ...]) and whether each matrix failed [n].
Routine = Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]


def robustly(routine: Routine, matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Decompose every matrix, retrying those that fail with ever more expensive remedies.

    Args:
        routine: The decomposition; it must report failures rather than raise.
        matrices: Symmetric matrices ``[..., d, d]``.

    Returns:
        The results ``[..., ...]`` and a boolean ``[...]``, True where every remedy failed.

    Cost:
        One host-device synchronisation to see whether anything failed.
    """
    leading = matrices.shape[:-2]
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    flat = (flat + flat.mT) / 2
    results, failed = routine(flat)
    for index in failed.nonzero().flatten().tolist():
        for candidate in _remedies(flat[index : index + 1]):
            retried, still_failed = routine(candidate)
            if not still_failed.item():
                for result, value in zip(results, retried, strict=True):
                    result[index] = value[0].to(result)
                failed[index] = False
                break
    return tuple(r.reshape(*leading, *r.shape[1:]) for r in results), failed.reshape(leading)


def _remedies(matrix: Tensor) -> Iterator[Tensor]:
    eps = torch.finfo(matrix.dtype).eps
    size = matrix.shape[-1]
    jitter = matrix.diagonal(dim1=-2, dim2=-1).abs().mean() * eps * size
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    yield matrix + jitter * eye
    if matrix.device.type != "mps":
        yield (matrix + jitter * eye).double()
    yield (matrix + 10 * jitter * eye).cpu().double()


def inverse_by_cholesky(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inverses of positive definite matrices ``[n, d, d]``, as a :data:`Routine`."""
    triangles, info = torch.linalg.cholesky_ex(matrices)
    undone = (info != 0).view(-1, 1, 1)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    # A zero on the diagonal makes cholesky_inverse raise for the whole stack.
    inverses = torch.cholesky_inverse(torch.where(undone, eye, triangles))
    failed = undone.flatten() | ~inverses.flatten(1).sum(1).isfinite()
    return (inverses,), failed


def eigenbasis(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Eigenvalues ``[n, d]`` (not negative) and eigenvectors ``[n, d, d]``, as a :data:`Routine`.

    The library raises for the whole stack when one matrix fails, and some backends return NaN
    without a word; both are turned into flags per matrix.
    """
    finite = matrices.flatten(1).sum(1).isfinite()
    safe = torch.where(finite.view(-1, 1, 1), matrices, 0.0)
    try:
        values, vectors = torch.linalg.eigh(safe)
    except LinAlgError:
        values, vectors = _eigh_one_by_one(safe)
    failed = ~(finite & values.sum(1).isfinite() & vectors.flatten(1).sum(1).isfinite())
    return (values.clamp(min=0), vectors), failed


def _eigh_one_by_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    values = matrices.new_full(matrices.shape[:-1], float("nan"))
    vectors = torch.full_like(matrices, float("nan"))
    for index, matrix in enumerate(matrices):
        try:
            values[index], vectors[index] = torch.linalg.eigh(matrix)
        except LinAlgError:
            continue  # stays NaN, which the caller flags
    return values, vectors
