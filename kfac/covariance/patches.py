"""Second moments of the patches that a convolution sees."""

from collections.abc import Sequence
from math import prod
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac.covariance.autocorrelation import by_fourier, by_weight_gradient
from kfac.covariance.channels import channel_covariance
from kfac.covariance.correlated import correlated_covariance
from kfac.covariance.cost import Method, axes_of, choose
from kfac.covariance.geometry import (
    Layout,
    PaddingMode,
    PatchGeometry,
    checked,
    layout_of,
    padded,
    windows_of,
)
from kfac.covariance.unfold import unfolded_covariance, view_dims


def patch_covariance(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    bias: bool = False,
) -> Tensor:
    """Sum the outer products of a convolution's input patches over examples and positions.

    Formula: ``A[g] = Σₙ Σₜ aₙₜ aₙₜᵀ``, neither centred nor normalised, where ``aₙₜ`` is the patch
    of group ``g`` under the kernel at output position ``t``, so that ``output = W a`` with
    ``W = weight.flatten(1)``.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        stride: As in :class:`PatchGeometry`, like the four that follow.
        padding: See there.
        dilation: See there.
        groups: See there.
        padding_mode: See there.
        bias: Append the constant 1 to every patch, as its last element.

    Returns:
        ``[groups, d, d]`` with ``d = C/groups·|kernel| (+ 1)`` for a kernel of ``|kernel|`` pixels,
        in the order of ``weight.flatten(1)``; float32, or float64 for a float64 input; symmetric up
        to rounding.

    Raises:
        ValueError: An argument is out of range, or the kernel does not fit into the padded input.

    Cost: at most ``groups·N·T·d²`` multiply-adds for ``T`` output positions; overlapping patches of
    stride 1 take about ``N·|spatial|·C²/groups`` without being made, see
    :func:`kfac.covariance.cost.choose`. Extra memory of the order of input and result, and 32 MiB
    (128 MiB on CUDA).
    Rounding is relative to the sum of the squares of ``x``. On CUDA the precision of products is
    that of torch's settings for matrix products and, where the weight gradient of a convolution is
    used, for convolutions, which may round float32 to TF32.

    Source: Grosse & Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution
    layers", section 3; there ``A`` is averaged over examples, here the caller divides.
    """
    x, layout = checked(
        "patch_covariance", x, kernel_size, stride=stride, padding=padding, dilation=dilation,
        groups=groups, padding_mode=padding_mode,
    )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        if groups == prod(layout.kernel) == 1:
            second = channel_covariance(padded(x, layout).view()).unsqueeze(0)
        else:
            second = second_moment(x, layout)
        return _with_constant(second, x, layout) if bias else second


def extract_patches(
    x: Tensor, kernel_size: int | Sequence[int], **geometry: Unpack[PatchGeometry]
) -> Tensor:
    """Collect the patches themselves, as columns.

    Formula: ``(weight.unflatten(0, (groups, -1)).flatten(2) @ patches).flatten(1, 2)`` is the
    convolution's output without bias, its positions flattened.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        **geometry: See :class:`PatchGeometry`.

    Returns:
        ``[N, groups, d, T]``, ``d = C/groups·|kernel|``, dtype as in :func:`patch_covariance`.

    Raises:
        ValueError: As :func:`patch_covariance`.

    Cost: a copy of ``x`` times the size of the kernel, divided by the stride in each direction.
    """
    windows = windows_of("extract_patches", x, kernel_size, **geometry)
    output, kernel = view_dims(windows)
    patches = windows.view().permute(0, 1, *kernel, *output)
    return patches.reshape(len(x), windows.layout.groups, windows.rows, windows.layout.positions)


def patch_count(
    spatial: Sequence[int], kernel_size: int | Sequence[int], **geometry: Unpack[PatchGeometry]
) -> int:
    """Count the positions ``T`` at which the kernel is applied to one example.

    Args:
        spatial: Size of the input in pixels, ``x.shape[2:]``.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        **geometry: See :class:`PatchGeometry`; ``groups`` has no influence.

    Returns:
        Product of the spatial sizes of the convolution's output.

    Raises:
        ValueError: As :func:`patch_covariance`.
    """
    return layout_of("patch_count", tuple(spatial), kernel_size, **geometry).positions


def patch_mean(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    bias: bool = False,
    **geometry: Unpack[PatchGeometry],
) -> Tensor:
    """Average the patches of each example over the output positions.

    Formula: ``āₙ = (1/T) Σₜ aₙₜ``.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        bias: Append the constant 1.
        **geometry: See :class:`PatchGeometry`.

    Returns:
        ``[N, groups, d]``, ``d`` and dtype as in :func:`patch_covariance`.

    Raises:
        ValueError: As :func:`patch_covariance`.

    Cost: one direction is summed after the other, with about as many passes over ``x`` as the
    kernel has pixels in the first; no patches.

    Source: Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural
    Network Architectures", section 3.2 (the "reduce" setting).
    """
    windows = windows_of("patch_mean", x, kernel_size, **geometry)
    mean = windows.sum() / windows.layout.positions
    return F.pad(mean, (0, 1), value=1.0) if bias else mean


def patch_second_moment_diagonal(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    bias: bool = False,
    **geometry: Unpack[PatchGeometry],
) -> Tensor:
    """Compute the diagonal of :func:`patch_covariance` without the matrix.

    Formula: ``Σₙ Σₜ aₙₜ²``, element by element.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        bias: Append the entry of the constant, ``N·T``.
        **geometry: See :class:`PatchGeometry`.

    Returns:
        ``[groups, d]``, ``d`` and dtype as in :func:`patch_covariance`.

    Raises:
        ValueError: As :func:`patch_covariance`.

    Cost: as :func:`patch_mean`, and one copy of ``x``.
    """
    windows = windows_of("patch_second_moment_diagonal", x, kernel_size, **geometry)
    diagonal = windows._replace(x=windows.x.square()).sum().sum(0)
    return F.pad(diagonal, (0, 1), value=float(windows.patches)) if bias else diagonal


def _with_constant(second: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Append the row and the column of the constant 1: the sum of the patches, and their number."""
    bordered = F.pad(second, (0, 1, 0, 1), value=float(len(x) * layout.positions))
    total = padded(x.sum(0, keepdim=True), layout).sum()[0]
    bordered[:, -1, :-1] = bordered[:, :-1, -1] = total
    return bordered


def second_moment(x: Tensor, layout: Layout, method: Method | None = None) -> Tensor:
    """Sum the outer products of patches, ``[groups, d, d]``.

    Args:
        x: Input in the dtype of sums.
        layout: Geometry of the convolution.
        method: How to compute it; None leaves that to :func:`kfac.covariance.cost.choose`. All give
            the same up to rounding, but gradients reach ``x`` through ``"unfold"`` only.
    """
    if layout.padding_mode != "zeros":  # the other methods take the input for zero outside
        x = padded(x, layout).x
        layout = layout._replace(margins=((0, 0),) * (x.dim() - 2), padding_mode="zeros")
    axes = axes_of(x.shape[2:], layout)
    if method is None:
        differentiable = x.requires_grad and torch.is_grad_enabled()
        method = (
            "unfold"
            if differentiable
            else choose(x.shape, layout, axes, x.device.type, x.element_size())
        )
    if method == "unfold" or axes is None or not len(x):
        return unfolded_covariance(padded(x, layout))
    autocorrelation = by_fourier if method == "fourier" else by_weight_gradient
    return correlated_covariance(x, axes, layout.groups, autocorrelation)
