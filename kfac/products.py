"""Products of matrices with Kronecker factors of every kind."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def multiply(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    """Return left · matrix · right.

    None is the identity; a factor with one axis fewer is a diagonal, one with an axis more consists
    of blocks on the diagonal, as in :class:`kfac.factors.BlockShape`.

    Args:
        left: ``[layers, groups, d_out, d_out]``, ``[layers, groups, d_out]``,
            ``[layers, groups, blocks, b, b]`` or None.
        matrix: ``[layers, groups, d_out, d_in]``.
        right: Likewise, of ``d_in`` rows.
    """
    if left is not None:
        matrix = _PRODUCTS_FROM_LEFT[left.dim()](left, matrix)
    if right is not None:
        matrix = _PRODUCTS_FROM_RIGHT[right.dim()](matrix, right)
    return matrix


# From this inner dimension on a matrix product is large.
_LARGE = 256


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The batched matrix product ``[layers, groups, ...]``; large ones one by one on a CPU.

    There the library spreads a single product over the cores better than a batch of them.
    """
    if left.device.type != "cpu" or left.shape[-1] < _LARGE:
        return left @ right
    result = left.new_empty(*left.shape[:-1], right.shape[-1])
    for index in product(*map(range, left.shape[:-2])):
        torch.matmul(left[index], right[index], out=result[index])
    return result


def _blockwise_from_left(blocks: Tensor, matrix: Tensor) -> Tensor:
    result = torch.empty_like(matrix)
    size = blocks.shape[-1]
    parts = zip(torch.split(matrix, size, -2), torch.split(result, size, -2), strict=True)
    for index, (part, target) in enumerate(parts):
        rows = part.shape[-2]
        target.copy_(_product(blocks[..., index, :rows, :rows], part))
    return result


def _blockwise_from_right(matrix: Tensor, blocks: Tensor) -> Tensor:
    result = torch.empty_like(matrix)
    size = blocks.shape[-1]
    parts = zip(torch.split(matrix, size, -1), torch.split(result, size, -1), strict=True)
    for index, (part, target) in enumerate(parts):
        columns = part.shape[-1]
        target.copy_(_product(part, blocks[..., index, :columns, :columns]))
    return result


_PRODUCTS_FROM_LEFT: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    3: lambda diagonal, matrix: diagonal.unsqueeze(-1) * matrix,
    4: _product,
    5: _blockwise_from_left,
}
_PRODUCTS_FROM_RIGHT: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    3: lambda matrix, diagonal: matrix * diagonal.unsqueeze(-2),
    4: _product,
    5: _blockwise_from_right,
}
