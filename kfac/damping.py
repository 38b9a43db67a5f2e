"""Tikhonov damping of a Kronecker product, as plain functions of traces.

The curvature block of a layer is A ⊗ G. Damping it by λ exactly, A ⊗ G + λI, needs the joint
eigenbasis (``inverse="eigen"``). The factored form damps each factor by itself,

    (A + π√λ I) ⊗ (G + √λ/π I),

which needs no eigenbasis (``inverse="cholesky"``, ``"newton-schulz"`` and ``"inverse-free"``).
"""

import torch
from torch import Tensor


def trace(factor: Tensor) -> Tensor:
    """Trace of factors: of dense ones, of diagonal blocks, or of diagonals.

    Args:
        factor: ``[layers, groups, d, d]``, ``[layers, groups, blocks, b, b]`` or
            ``[layers, groups, d]``.

    Returns:
        ``[layers, groups]``.
    """
    diagonal = factor.diagonal(dim1=-2, dim2=-1) if factor.dim() >= 4 else factor
    return diagonal.flatten(2).sum(-1)


def pi_ratio(a: Tensor, g: Tensor, d_in: int, d_out: int) -> Tensor:
    """π = √((tr A / d_in) / (tr G / d_out)), and 1 where a trace is zero.

    Args:
        a: Input factors, as in :func:`trace`.
        g: Gradient factors, as in :func:`trace`.
        d_in: Number of rows of A.
        d_out: Number of rows of G.

    Returns:
        ``[layers, groups]``, positive.

    Source:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", section 6.3.
    """
    mean_a = trace(a) / d_in
    mean_g = trace(g) / d_out
    ratio = (mean_a / mean_g).sqrt()
    return torch.where((mean_a > 0) & (mean_g > 0) & ratio.isfinite(), ratio, 1.0)


def factored_damping(
    a: Tensor, g: Tensor, damping: Tensor, d_in: int, d_out: int
) -> tuple[Tensor, Tensor]:
    """Split λ between the two factors: π√λ for A and √λ/π for G.

    Args:
        a: Input factors, as in :func:`pi_ratio`, like those that follow but the damping.
        g: Gradient factors.
        damping: λ of each layer ``[layers]``, in units of the Fisher.
        d_in: Number of rows of A.
        d_out: Number of rows of G.

    Returns:
        Two tensors ``[layers, groups]``: what is added to the diagonals of A and of G.

    Source:
        Martens & Grosse 2015, section 6.3.
    """
    pi = pi_ratio(a, g, d_in, d_out)
    root = damping.sqrt().unsqueeze(-1)
    return pi * root, root / pi


def damped(factor: Tensor, amount: Tensor) -> Tensor:
    """Return ``factor + amount · I`` as a new tensor; the factor itself stays as it is.

    Args:
        factor: As in :func:`trace`.
        amount: ``[layers, groups]``.
    """
    result = factor.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1) if factor.dim() >= 4 else result
    diagonal += amount.view(*amount.shape, *[1] * (diagonal.dim() - 2))
    return result
