"""Tikhonov damping of a Kronecker product, as plain functions of traces.

The curvature block of a layer is A ⊗ G. Damping it by λ exactly, A ⊗ G + λI, needs the joint
eigenbasis (``inverse="eigen"``). The factored form damps each factor by itself,

    (A + π√λ I) ⊗ (G + √λ/π I),

which needs no eigenbasis (``inverse="cholesky"`` and ``"newton-schulz"``).
"""

import torch
from torch import Tensor


def trace(factor: Tensor) -> Tensor:
    """Trace of dense factors ``[layers, groups, d, d]`` or of diagonals ``[layers, groups, d]``.

    Returns:
        ``[layers, groups]``.
    """
    diagonal = factor.diagonal(dim1=-2, dim2=-1) if factor.dim() == 4 else factor
    return diagonal.sum(-1)


def pi_ratio(a: Tensor, g: Tensor) -> Tensor:
    """π = √((tr A / d_in) / (tr G / d_out)), and 1 where a trace is zero.

    Args:
        a: Input factors ``[layers, groups, d_in, d_in]`` (or diagonals, one dimension fewer).
        g: Gradient factors ``[layers, groups, d_out, d_out]`` (or diagonals).

    Returns:
        ``[layers, groups]``, positive.

    Source:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", section 6.3.
    """
    mean_a = trace(a) / a.shape[-1]
    mean_g = trace(g) / g.shape[-1]
    ratio = (mean_a / mean_g).sqrt()
    return torch.where((mean_a > 0) & (mean_g > 0) & ratio.isfinite(), ratio, 1.0)


def factored_damping(a: Tensor, g: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Split λ between the two factors: π√λ for A and √λ/π for G.

    Args:
        a: Input factors, as in :func:`pi_ratio`.
        g: Gradient factors, as in :func:`pi_ratio`.
        damping: λ of each layer ``[layers]``, in units of the Fisher.

    Returns:
        Two tensors ``[layers, groups]``: what is added to the diagonals of A and of G.

    Source:
        Martens & Grosse 2015, section 6.3.
    """
    pi = pi_ratio(a, g)
    root = damping.sqrt().unsqueeze(-1)
    return pi * root, root / pi


def damped(factor: Tensor, amount: Tensor) -> Tensor:
    """Return ``factor + amount · I`` as a new tensor; the factor itself stays as it is.

    Args:
        factor: ``[layers, groups, d, d]``, or diagonals ``[layers, groups, d]``.
        amount: ``[layers, groups]``.
    """
    if factor.dim() == 3:
        return factor + amount.unsqueeze(-1)
    result = factor.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(amount.unsqueeze(-1))
    return result
