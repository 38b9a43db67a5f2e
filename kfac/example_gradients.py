"""Second moments of per-example gradients in a Kronecker-factored basis."""

from typing import NamedTuple

import torch
from torch import Tensor

from kfac.products import multiply

# Per-example gradients are formed in pieces of at most this many elements.
_CHUNK_ELEMENTS = 2**23


class Basis(NamedTuple):
    """A joint basis Q_A ⊗ Q_G per group; None stands for the unit vectors.

    Attributes:
        a: ``[groups, d_in, d_in]``, basis vectors as columns; or blocks on the diagonal, as in
            :class:`kfac.factors.BlockShape`.
        g: Likewise, of ``d_out`` rows.
    """

    a: Tensor | None
    g: Tensor | None


def squared_gradients(inputs: Tensor, gradients: Tensor, basis: Basis) -> Tensor:
    """Sum the squares of per-example gradients, element by element in a basis.

    Formula: ``Σₙ (Q_Gᵀ (Σₜ gₙₜ aₙₜᵀ) Q_A)²``. Either the rows are rotated or the gradients that are
    formed from them, whichever takes fewer multiplications.

    Args:
        inputs: Rows a ``[n, positions, groups, d_in]``.
        gradients: Rows g ``[n, positions, groups, d_out]``.
        basis: Q_A and Q_G.

    Returns:
        ``[groups, d_out, d_in]``.

    Cost:
        ``n·t·d_in·d_out`` multiply-adds for t positions, and the smaller of
        ``n·t·(d_in² + d_out²)`` and ``n·d_in·d_out·(d_in + d_out)`` for the rotation.

    Source:
        George et al. 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
        Eigenbasis", section 3.
    """
    positions, d_in, d_out = inputs.shape[1], inputs.shape[-1], gradients.shape[-1]
    on_inputs, on_outputs = basis.a is not None, basis.g is not None
    of_rows = positions * (on_inputs * d_in**2 + on_outputs * d_out**2)
    of_gradients = d_in * d_out * (on_inputs * d_in + on_outputs * d_out)
    contract = by_rotated_rows if of_rows <= of_gradients else by_rotated_gradients
    return contract(inputs, gradients, basis)


def by_rotated_rows(inputs: Tensor, gradients: Tensor, basis: Basis) -> Tensor:
    """As :func:`squared_gradients`, rotating every row: cheap for few positions."""
    a, g = inputs.transpose(1, 2), gradients.transpose(1, 2)
    a, g = _rotated(a, basis.a), _rotated(g, basis.g)
    if inputs.shape[1] == 1:
        # The square of an outer product is the outer product of the squares.
        a, g = (rows.squeeze(2).transpose(0, 1).square() for rows in (a, g))
        return g.mT @ a
    return _sum_of_squares(a, g, Basis(None, None))


def by_rotated_gradients(inputs: Tensor, gradients: Tensor, basis: Basis) -> Tensor:
    """As :func:`squared_gradients`, rotating every gradient: cheap for many positions."""
    return _sum_of_squares(inputs.transpose(1, 2), gradients.transpose(1, 2), basis)


def _sum_of_squares(a: Tensor, g: Tensor, basis: Basis) -> Tensor:
    """Σₙ (Q_Gᵀ gₙᵀ aₙ Q_A)² of ``a [n, groups, t, d_in]`` and ``g [n, groups, t, d_out]``."""
    _, groups, _, d_in = a.shape
    total = a.new_zeros(groups, g.shape[-1], d_in)
    examples = max(1, _CHUNK_ELEMENTS // total.numel())
    parts = zip(torch.split(a, examples), torch.split(g, examples), strict=True)
    for some_a, some_g in parts:
        matrices = _rotated(some_g.mT @ some_a, basis.a)
        matrices = _rotated(matrices.mT, basis.g).mT
        total += matrices.square_().sum(0)
    return total


def _rotated(rows: Tensor, vectors: Tensor | None) -> Tensor:
    """Rows ``[n, groups, t, d]`` times basis vectors."""
    if vectors is None or vectors.dim() == 3:
        return rows if vectors is None else rows @ vectors
    together = rows.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    rotated = multiply(None, together, vectors.unsqueeze(0)).squeeze(0)
    return torch.unflatten(rotated, 1, (len(rows), -1)).transpose(0, 1)
