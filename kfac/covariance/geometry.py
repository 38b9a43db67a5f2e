"""Where a convolution's kernel meets its input: checks the arguments, pads, and views windows."""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor

from kfac.arguments import argument_error
from kfac.covariance.channels import to_accumulator

PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]
_TORCH_MODES = {
    "zeros": "constant",
    "circular": "circular",
    "reflect": "reflect",
    "replicate": "replicate",
}
# How far the padding must stay below the input's size, where torch has a limit.
_SHORTFALL = {"circular": 0, "reflect": 1}
_MOST_SPATIAL_DIMS = 3


class PatchGeometry(TypedDict, total=False):
    """Where a convolution's kernel is applied; names, values and defaults of ``nn.Conv1d`` to 3d.

    One number stands for all spatial dimensions, a sequence gives one for each.

    Keys:
        stride: Distance between neighbouring patches in pixels, at least 1; default 1.
        padding: Pixels added on both sides of each dimension, ``"same"`` (needs stride 1; an odd
            total puts the extra pixel at the end) or ``"valid"`` (none); default 0.
        dilation: Distance between neighbouring kernel elements in pixels, at least 1; default 1.
        groups: Number of blocks of channels that are convolved separately; default 1.
        padding_mode: What the added pixels hold: ``"zeros"`` (default), ``"circular"``,
            ``"reflect"`` or ``"replicate"``.
    """

    stride: int | Sequence[int]
    padding: int | Sequence[int] | str
    dilation: int | Sequence[int]
    groups: int
    padding_mode: PaddingMode


class Layout(NamedTuple):
    """Checked geometry; one entry per spatial dimension, margins as (before, after)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    margins: tuple[tuple[int, int], ...]
    output: tuple[int, ...]
    groups: int
    padding_mode: PaddingMode

    @property
    def positions(self) -> int:
        """Number of output positions per example."""
        return prod(self.output)


class Windows(NamedTuple):
    """An input padded so that its convolution needs no padding, and the geometry of that one."""

    x: Tensor
    layout: Layout

    @property
    def rows(self) -> int:
        """Elements of one group's patch."""
        return self.x.shape[1] // self.layout.groups * prod(self.layout.kernel)

    @property
    def patches(self) -> int:
        """Number of patches per group, over all examples."""
        return len(self.x) * self.layout.positions

    def view(self) -> Tensor:
        """Show every patch without a copy, as ``[N, C, *output, *kernel]``."""
        windows = self.x
        for dim, (size, stride, dilation) in enumerate(_axes(self.layout), start=2):
            windows = windows.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return windows

    def sum(self) -> Tensor:
        """Sum the patches of each example, ``[N, groups, rows]``, one direction at a time."""
        total = self.x
        for size, stride, dilation in _axes(self.layout):
            span = dilation * (size - 1) + 1
            # The dimension in front is summed away and its kernel offsets go to the back, which
            # brings the next spatial dimension to the front.
            total = total.unfold(2, span, stride)[..., ::dilation].sum(2)
        return total.reshape(len(total), self.layout.groups, self.rows)


def windows_of(
    owner: str, x: Tensor, kernel_size: int | Sequence[int], **geometry: Unpack[PatchGeometry]
) -> Windows:
    """Check the arguments of ``owner``, cast ``x`` to the dtype of sums, and pad it."""
    return padded(*checked(owner, x, kernel_size, **geometry))


def checked(
    owner: str, x: Tensor, kernel_size: int | Sequence[int], **geometry: Unpack[PatchGeometry]
) -> tuple[Tensor, Layout]:
    """Check the arguments of ``owner`` and cast ``x`` to the dtype of sums."""
    x = to_accumulator(owner, x)
    if not 0 < x.dim() - 2 <= _MOST_SPATIAL_DIMS or min(x.shape[1:]) < 1:
        constraint = (
            f"of shape [N, C, *spatial] with one to {_MOST_SPATIAL_DIMS} spatial dimensions, "
            "at least one channel and pixel"
        )
        remedy = "Add the dimension of examples where it is missing: x.unsqueeze(0)."
        raise argument_error(owner, "x", constraint, list(x.shape), remedy)
    layout = layout_of(owner, tuple(x.shape[2:]), kernel_size, **geometry)
    if x.shape[1] % layout.groups:
        constraint = f"a divisor of the {x.shape[1]} channels of x"
        remedy = "Pass the layer's own groups."
        raise argument_error(owner, "groups", constraint, layout.groups, remedy)
    return x, layout


def padded(x: Tensor, layout: Layout) -> Windows:
    """Pad ``x`` so that its convolution needs no padding."""
    if any(map(any, layout.margins)):
        margins = [size for pair in reversed(layout.margins) for size in pair]
        x = F.pad(x, margins, mode=_TORCH_MODES[layout.padding_mode])
    return Windows(x, layout)


def layout_of(
    owner: str,
    spatial: tuple[int, ...],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> Layout:
    """Check the arguments of ``owner`` against an input of size ``spatial``."""
    dims = len(spatial)
    if not 0 < dims <= _MOST_SPATIAL_DIMS:
        constraint = f"one to {_MOST_SPATIAL_DIMS} sizes"
        raise argument_error(owner, "spatial", constraint, spatial, "Pass x.shape[2:].")
    if groups < 1:
        remedy = "Pass the layer's own groups."
        raise argument_error(owner, "groups", "an integer of at least 1", groups, remedy)
    kernel = _per_axis(owner, "kernel_size", kernel_size, dims, least=1)
    strides = _per_axis(owner, "stride", stride, dims, least=1)
    dilations = _per_axis(owner, "dilation", dilation, dims, least=1)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
    margins = _margins(owner, padding, spans, strides)
    _check_padding_mode(owner, padding_mode, margins, spatial)
    padded = tuple(size + sum(margin) for size, margin in zip(spatial, margins, strict=True))
    if any(span > size for span, size in zip(spans, padded, strict=True)):
        constraint = f"of a dilated extent that fits into the padded input of size {padded}"
        remedy = f"It spans {spans}: enlarge the input or the padding."
        raise argument_error(owner, "kernel_size", constraint, kernel, remedy)
    output = tuple((p - e) // s + 1 for p, e, s in zip(padded, spans, strides, strict=True))
    return Layout(kernel, strides, dilations, margins, output, groups, padding_mode)


def _axes(layout: Layout) -> "zip[tuple[int, int, int]]":
    return zip(layout.kernel, layout.stride, layout.dilation, strict=True)


def _per_axis(
    owner: str, argument: str, value: int | Sequence[int], dims: int, least: int
) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(sizes) != dims or not all(isinstance(s, int) and s >= least for s in sizes):
        constraint = f"an integer of at least {least}, or {dims} of them"
        remedy = "Pass the layer's own setting, and its input with the examples first."
        raise argument_error(owner, argument, constraint, value, remedy)
    return sizes


def _margins(
    owner: str,
    padding: int | Sequence[int] | str,
    spans: tuple[int, ...],
    stride: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        if any(s != 1 for s in stride):
            remedy = "Pass the padding in pixels, or stride=1."
            raise argument_error(owner, "stride", "1 with padding='same'", stride, remedy)
        return tuple(((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans)
    if isinstance(padding, str) and padding != "valid":
        remedy = "Pass the layer's own padding."
        raise argument_error(owner, "padding", "'same', 'valid' or in pixels", padding, remedy)
    pixels = 0 if isinstance(padding, str) else padding
    sizes = _per_axis(owner, "padding", pixels, len(spans), least=0)
    return tuple((size, size) for size in sizes)


def _check_padding_mode(
    owner: str, mode: str, margins: tuple[tuple[int, int], ...], spatial: tuple[int, ...]
) -> None:
    if mode not in _TORCH_MODES:
        remedy = "Pass the layer's own padding_mode."
        raise argument_error(owner, "padding_mode", f"one of {list(_TORCH_MODES)}", mode, remedy)
    if mode not in _SHORTFALL:
        return
    limits = tuple(size - _SHORTFALL[mode] for size in spatial)
    if any(max(margin) > limit for margin, limit in zip(margins, limits, strict=True)):
        constraint = f"at most {limits} with padding_mode={mode!r}"
        remedy = "This mode can repeat the input once only: pad less, or enlarge the input."
        raise argument_error(owner, "padding", constraint, margins, remedy)
