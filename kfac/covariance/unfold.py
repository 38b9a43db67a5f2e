"""Second moments of patches from the patches themselves, made in pieces: the reference path."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from kfac.covariance.geometry import Windows

# Allocators reuse buffers below 32 MiB, and the page faults of fresh ones cost more than the larger
# matrix products gain.
CHUNK_BYTES = 16 * 2**20
# A symmetric product is computed in up to so many bands of rows, of at least so many rows each.
_BANDS = 8
_LEAST_ROWS = 96


def unfolded_covariance(windows: Windows) -> Tensor:
    """Sum the outer products of patches, ``[groups, d, d]``.

    Cost: ``groups·N·T·d²`` multiply-adds for ``T`` output positions, 9/16 of it for a large ``d``;
    memory of 16 MiB of patches, or of a single one that takes more.
    """
    groups, rows = windows.layout.groups, windows.rows
    total = windows.x.new_zeros(groups, rows, rows)
    bands = row_bands(rows)
    output, kernel = view_dims(windows)
    patches = max(1, CHUNK_BYTES // (groups * rows * windows.x.element_size()))
    for part in _parts(windows.view(), (0, *output), patches):
        columns = part.permute(1, *kernel, 0, *output).reshape(groups, rows, -1)
        for band in bands:  # in place: autocast then leaves it in float32
            total[:, band, band.start :].baddbmm_(columns[:, band], columns[:, band.start :].mT)
    for band in bands[:-1]:
        total[:, band.stop :, band] = total[:, band, band.stop :].mT
    return total


def view_dims(windows: Windows) -> tuple[range, range]:
    """Dimensions of the outputs and of the kernel in the view of all patches."""
    dims = len(windows.layout.kernel)
    return range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)


def row_bands(rows: int) -> list[slice]:
    """Split the rows of a symmetric product: each is multiplied with itself and all that follow."""
    step = max(_LEAST_ROWS, -(-rows // _BANDS))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _parts(view: Tensor, dims: tuple[int, ...], patches: int) -> Iterator[Tensor]:
    """Split the view of all patches into pieces of at most ``patches``, along ``dims`` in turn."""
    first, *rest = dims
    inner = prod(view.shape[dim] for dim in rest)
    for part in torch.split(view, max(1, patches // inner), first):
        if inner > patches:
            yield from _parts(part, tuple(rest), patches)
        else:
            yield part
