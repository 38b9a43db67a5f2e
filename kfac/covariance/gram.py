"""Products of a matrix with its own transpose, of which one triangle is computed."""

import torch
from torch import Tensor

# A symmetric product is computed in up to so many bands of rows, of at least so many rows each.
_BANDS = 8
_LEAST_ROWS = 96


def gram(rows: Tensor) -> Tensor:
    """Sum the outer products of rows, ``Σₙ rₙ rₙᵀ`` per group.

    Args:
        rows: ``[n, groups, d]``.

    Returns:
        ``[groups, d, d]``, of the dtype of ``rows``.

    Cost: ``n·groups·d²`` multiply-adds, 9/16 of it for a large ``d`` on a CPU.
    """
    stacked = rows.transpose(0, 1)
    bands = row_bands(rows.shape[-1])
    # Elsewhere starting several operations costs more than half of the products.
    if len(bands) == 1 or rows.requires_grad or rows.device.type != "cpu":
        return stacked.mT @ stacked
    result = rows.new_empty(stacked.shape[0], rows.shape[-1], rows.shape[-1])
    for band in bands:
        left, right = stacked[..., band].mT, stacked[..., band.start :]
        torch.matmul(left, right, out=result[:, band, band.start :])
    for band in bands[:-1]:
        result[:, band.stop :, band] = result[:, band, band.stop :].mT
    return result


def row_bands(rows: int) -> list[slice]:
    """Split the rows of a symmetric product: each is multiplied with itself and all that follow."""
    step = max(_LEAST_ROWS, -(-rows // _BANDS))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
