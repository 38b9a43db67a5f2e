"""One spatial dimension of a convolution as a sum over all pixels less what its kernel misses."""

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# So many constants are kept: those of all layers of a large model.
_CONSTANTS = 256

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value", bound=Tensor | tuple[Tensor, ...])


def constant(make: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Keep what a function of sizes, a dtype and a device returns; nobody may modify it.

    The tensors are ordinary ones, whatever mode the first call is made in: those of inference mode
    would not serve autograd later, and those of a mode that intercepts operations are not kept.
    """
    kept = lru_cache(_CONSTANTS)(make)

    @wraps(make)
    def ordinary(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        if _get_current_dispatch_mode() is not None:
            return make(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return kept(*args, **kwargs)  # type: ignore[arg-type]

    return ordinary


class Part(IntEnum):
    """Which pixels of a dimension a sum is over."""

    ALL = 0
    FIRST = 1
    LAST = 2


class Axis(NamedTuple):
    """A spatial dimension of ``phases·size`` pixels, cut into phases so that its stride is 1.

    Pixel ``phases·q + φ`` becomes pixel ``q`` of phase φ; the kernel's element ``i`` has the place
    ``lead + i``, and by that an offset and a phase likewise. At output position ``p`` it meets the
    pixel ``p + dilation·offset − before`` of its phase, or zero where there is none.
    """

    size: int
    phases: int
    dilation: int
    before: int
    output: int
    taps: int
    lead: int

    @property
    def reach(self) -> int:
        """Largest offset."""
        return (self.lead + self.taps - 1) // self.phases

    @property
    def first(self) -> int:
        """Number of pixels at the start that some offset misses."""
        return max(0, min(self.size, self.dilation * self.reach - self.before))

    @property
    def last(self) -> int:
        """Number of pixels at the end that some offset misses."""
        return max(0, min(self.size, self.size + self.before - self.output))

    def border(self, part: Part) -> tuple[int, int]:
        """Start and number of the pixels of a part."""
        sizes = (self.size, self.first, self.last)
        return (self.size - self.last if part == Part.LAST else 0), sizes[part]

    def sums(self, part: Part) -> int:
        """Number of sums over a part: one per shift, or per pair of pixels of a border."""
        return (2 * self.reach + 1, self.first**2, self.last**2)[part]


def axis_of(
    size: int, kernel: int, stride: int, dilation: int, before: int, output: int
) -> Axis | None:
    """Describe a dimension of ``size`` pixels, padded with ``before`` zeros in front.

    Returns:
        None for a kernel that is both dilated and strided.
    """
    if kernel == 1:
        dilation = 1
    if stride > 1 and dilation > 1:
        return None
    reached = stride * (output - 1) + dilation * (kernel - 1) + 1 - before
    used = max(1, min(size, reached))
    steps = -(-before // stride)
    return Axis(
        -(-used // stride), stride, dilation, steps, output, kernel, stride * steps - before
    )


@constant
def selection(axis: Axis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights of all sums over one dimension in the entries for pairs of kernel elements.

    Formula: ``A[i, k] = S[o_k − o_i] − Σ_{p < 0} − Σ_{p ≥ output}`` of
    ``x[p + dilation·o_i − before] x[p + dilation·o_k − before]ᵀ`` in the phases of ``i`` and ``k``.

    Returns:
        ``[taps², (2·reach + 1 + first² + last²)·phases²]``, see :func:`constant`.
    """
    places = torch.arange(axis.taps, device=device) + axis.lead
    offsets, phases = places // axis.phases, places % axis.phases
    shifts = torch.arange(-axis.reach, axis.reach + 1, device=device)
    all_pixels = ((offsets - offsets[:, None])[..., None] == shifts).to(dtype)
    start = axis.dilation * offsets - axis.before - 1
    end = axis.size - axis.output - start - 2
    first = _missed(start, torch.arange(axis.first, device=device))
    last = _missed(end, torch.arange(axis.last, device=device).flip(0))
    sums = torch.cat([all_pixels, -first.to(dtype), -last.to(dtype)], -1)
    here = (phases[:, None] == torch.arange(axis.phases, device=device)).to(dtype)
    pairs = here[:, None, None, :, None] * here[:, None, None, :]
    return (sums[..., None, None] * pairs).flatten(2).flatten(0, 1)


def _missed(nearest: Tensor, pixels: Tensor) -> Tensor:
    """Which pairs of pixels of a border meet the elements ``i`` and ``k`` at an unused position.

    Args:
        nearest: The pixel that each element meets at the first such position, counted from the
            border inwards; at the next positions it meets the ones before that.
        pixels: The border's pixels, counted likewise.

    Returns:
        ``[i, k, |pixels|²]``.
    """
    steps = nearest[:, None] - pixels
    same = steps[:, None, :, None] == steps[None, :, None, :]
    return (same & (steps[:, None, :, None] >= 0)).flatten(2)
