"""How wrong an inverse has become since it was made, without inverting anything."""

import torch
from torch import Tensor

from kfac.products import multiply

# Columns of V. Where a single direction has moved, the square of the estimate has a χ² distribution
# with so many degrees of freedom: the estimate is 10 times too small less than once in 10⁶.
COLUMNS = 8
_SEED = 0


def probes(factor: Tensor, rows: int) -> Tensor:
    """Normally distributed directions V ``[layers, groups, rows, 8]``, the same in every call.

    Args:
        factor: What they are for, ``[layers, groups, ...]``; gives dtype and device.
        rows: Number of rows of the factor.
    """
    generator = torch.Generator().manual_seed(_SEED)
    v = torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float32)
    return v.to(factor, non_blocking=True).expand(*factor.shape[:2], rows, COLUMNS)


def relative_residual(factor: Tensor, amount: Tensor, solved: Tensor, v: Tensor) -> Tensor:
    """‖M X V − V‖/‖V‖ in the Frobenius norm, for M = factor + amount·I: about ‖M X − I‖/√d.

    Args:
        factor: ``[layers, groups, ...]``, of any kind that :func:`kfac.products.multiply` takes.
        amount: ``[layers, groups]``.
        solved: X V ``[layers, groups, d, 8]``.
        v: V, likewise.

    Returns:
        ``[layers]``, the largest over groups.

    Cost:
        8 d² multiply-adds.
    """
    residual = multiply(factor, solved, None) + amount.view(*amount.shape, 1, 1) * solved - v
    norms, scale = (torch.linalg.vector_norm(t, dim=(2, 3)) for t in (residual, v))
    largest: Tensor = (norms / scale).amax(1)
    return largest
