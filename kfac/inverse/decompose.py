"""Decompositions of stacked symmetric matrices that survive bad matrices.

A matrix that a routine cannot decompose is tried again by itself: with jitter on its diagonal,
then in float64, then in float64 on the CPU. What still fails is reported, never raised, so that
the caller can keep its last good result.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

# A decomposition: matrices [n, d, d] -> results (each [n, ...]) and whether each matrix failed [n].
Routine = Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]


def robustly(routine: Routine, matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Decompose every matrix, retrying those that fail with ever more expensive remedies.

    Args:
        routine: The decomposition; it must report failures rather than raise.
        matrices: Symmetric matrices ``[..., d, d]``.

    Returns:
        The results ``[..., ...]`` and a boolean ``[...]``, True where every remedy failed and
        where the matrix is not finite.

    Cost:
        One host-device synchronisation to see whether anything failed.
    """
    leading = matrices.shape[:-2]
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    flat = (flat + flat.mT) / 2
    hopeless = ~flat.abs().amax((1, 2)).isfinite()
    results, failed = routine(torch.where(hopeless.view(-1, 1, 1), 0.0, flat))
    failed |= hopeless
    for index in (failed & ~hopeless).nonzero().flatten().tolist():
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
    (inverses,) = _of_each(_cholesky_inverse, matrices, (torch.full_like(matrices, torch.nan),))
    return (inverses,), ~inverses.flatten(1).sum(1).isfinite()


def _cholesky_inverse(matrices: Tensor) -> tuple[Tensor, ...]:
    """Inverses ``[..., d, d]``, NaN where there is no Cholesky decomposition."""
    triangles, info = torch.linalg.cholesky_ex(matrices)
    undone = (info != 0)[..., None, None]
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    # A zero on the diagonal makes cholesky_inverse raise for the whole stack.
    inverses = torch.cholesky_inverse(torch.where(undone, eye, triangles))
    return (inverses.masked_fill(undone, torch.nan),)


def eigenbasis(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Eigenvalues ``[n, d]`` (not negative) and eigenvectors ``[n, d, d]``, as a :data:`Routine`.

    The library raises for the whole stack when one matrix fails, and some backends return NaN
    without a word; both are turned into flags per matrix.
    """
    blank = torch.full_like(matrices, torch.nan)
    values, vectors = _of_each(_eigh, matrices, (blank[..., 0].clone(), blank))
    failed = ~(values.sum(1).isfinite() & vectors.flatten(1).sum(1).isfinite())
    return (values.clamp(min=0), vectors), failed


def _eigh(matrices: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.eigh(matrices))


def _of_each(
    solve: Callable[[Tensor], tuple[Tensor, ...]], matrices: Tensor, blank: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What a library makes of a stack, or of each matrix by itself where it raises for the stack.

    Not only for what it cannot decompose: the libraries of some devices have errors of their own,
    and a stack may need more memory than there is.

    Args:
        solve: Takes ``[n, d, d]`` or ``[d, d]``.
        matrices: ``[n, d, d]``.
        blank: The results for matrices at which it raises, which serve as work space.
    """
    try:
        return solve(matrices)
    except RuntimeError:
        for index, matrix in enumerate(matrices):
            with suppress(RuntimeError):
                for target, value in zip(blank, solve(matrix), strict=True):
                    target[index] = value
        return blank
