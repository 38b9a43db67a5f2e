"""Second moments of patches from the patches themselves, made in pieces: the reference path."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from kfac.covariance.geometry import Windows
from kfac.covariance.gram import row_bands

# On a CPU, allocators reuse buffers below 32 MiB, and the page faults of fresh ones cost more than
# the larger matrix products gain. That of CUDA reuses all, and small products leave a GPU idle.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}


def unfolded_covariance(windows: Windows) -> Tensor:
    """Sum the outer products of patches, ``[groups, d, d]``.

    Cost: ``groups·N·T·d²`` multiply-adds for ``T`` output positions, 9/16 of it for a large ``d``;
    memory of 16 MiB of patches (128 MiB on CUDA), or of a single one that takes more.
    """
    groups, rows = windows.layout.groups, windows.rows
    total = windows.x.new_zeros(groups, rows, rows)
    bands = row_bands(rows)
    output, kernel = view_dims(windows)
    limit = chunk_bytes(windows.x.device.type)
    patches = max(1, limit // (groups * rows * windows.x.element_size()))
    for part in _parts(windows.view(), (0, *output), patches):
        columns = part.permute(1, *kernel, 0, *output).reshape(groups, rows, -1)
        for band in bands:  # in place: autocast then leaves it in float32
            total[:, band, band.start :].baddbmm_(columns[:, band], columns[:, band.start :].mT)
    for band in bands[:-1]:
        total[:, band.stop :, band] = total[:, band, band.stop :].mT
    return total


def chunk_bytes(device: str) -> int:
    """Size of the pieces in which patches are made on a type of device."""
    return CHUNK_BYTES["cuda" if device == "cuda" else "cpu"]


def view_dims(windows: Windows) -> tuple[range, range]:
    """Dimensions of the outputs and of the kernel in the view of all patches."""
    dims = len(windows.layout.kernel)
    return range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)


def _parts(view: Tensor, dims: tuple[int, ...], patches: int) -> Iterator[Tensor]:
    """Split the view of all patches into pieces of at most ``patches``, along ``dims`` in turn."""
    first, *rest = dims
    inner = prod(view.shape[dim] for dim in rest)
    for part in torch.split(view, max(1, patches // inner), first):
        if inner > patches:
            yield from _parts(part, tuple(rest), patches)
        else:
            yield part
