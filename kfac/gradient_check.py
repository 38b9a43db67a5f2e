"""Whether what taps see adds up to the gradients of the weights."""

import warnings
import weakref
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac.graph import current_pass
from kfac.layers import Layer

# How far Σ g aᵀ may be from a weight's gradient, relative to it, ...
_TOLERANCE, _TOLERANCE_OF_HALVES = 0.01, 0.1
# ... or to ‖g‖ ‖a‖ in units of the precision, where the terms of the sum cancel.
_ROUNDINGS = 16


class GradientCheck:
    """Compares Σ g aᵀ with the gradient that autograd computes, once for every weight.

    A difference means that the weight is also used where no tap sees it, or that the layer does not
    compute what its type says.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._names: dict[nn.Parameter, str] = {}
        for layer in layers:
            self._names.setdefault(layer.weight.parameter, layer.name)
        # By backward pass: reentrant checkpointing has passes inside of the user's, and each of
        # them ends with a gradient of its own.
        self._totals: dict[tuple[nn.Parameter, int | None], Tensor] = {}
        self._scales: dict[tuple[nn.Parameter, int | None], Tensor | float] = {}
        self._handles: dict[nn.Parameter, RemovableHandle] = {}
        self._halves: set[nn.Parameter] = set()
        self._errors: dict[nn.Parameter, Tensor] = {}

    def leave_out(self, weights: Iterable[nn.Parameter]) -> None:
        """Do not compare some weights."""
        for weight in weights:
            self._names.pop(weight, None)

    def add(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        """Take a layer's input and the gradient of its output from the training pass under way."""
        weight = layer.weight.parameter
        if weight not in self._names or weight in self._errors:
            return
        key = weight, current_pass()
        if key not in self._totals:
            self._totals[key] = torch.zeros_like(weight, dtype=layer.dtype)
        if weight not in self._handles:
            hook = partial(_compare, weakref.ref(self), weakref.ref(weight))
            self._handles[weight] = weight.register_hook(hook)  # type: ignore[no-untyped-call]
        if gradient.dtype.itemsize < torch.float32.itemsize:
            self._halves.add(weight)
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            matrix, scale = layer.summed_gradient(x, gradient)
            part, *_ = layer.unmatrix(matrix)
            layer.weight.of(self._totals[key]).add_(part)
            roundings = _ROUNDINGS * torch.finfo(gradient.dtype).eps
            self._scales[key] = self._scales.get(key, 0.0) + scale * roundings

    def compare(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """A weight's gradient in the pass under way is known."""
        key = weight, current_pass()
        if key not in self._totals:
            return
        total, scale = self._totals.pop(key), self._scales.pop(key)
        if all(other is not weight for other, _ in self._totals):
            self._handles.pop(weight).remove()
        with torch.no_grad():
            gradient = gradient.to(total)
            excess = ((gradient - total).norm() - scale).clamp(min=0)
            self._errors[weight] = (excess / gradient.norm()).float()

    def give_up(self) -> None:
        """Forget a pass that did not come to its end."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._totals.clear()
        self._scales.clear()

    def report(self) -> None:
        """Warn of the differences that were found, for which it waits for the device."""
        if not self._errors:
            return
        errors = torch.stack([error.cpu() for error in self._errors.values()]).tolist()
        for weight, error in zip(self._errors, errors, strict=True):
            name = self._names.pop(weight, None)
            if name and error > (_TOLERANCE_OF_HALVES if weight in self._halves else _TOLERANCE):
                warnings.warn(
                    f"The gradient of the weight of the layer {name!r} differs by {error:.0%} from "
                    "what K-FAC sees of it: the weight is also used without calling its module, "
                    "or something changes its gradient. Leave the layer to the fallback with "
                    "skip=.",
                    stacklevel=2,
                )
        self._errors.clear()


def _compare(
    check: "weakref.ref[GradientCheck]", weight: "weakref.ref[nn.Parameter]", gradient: Tensor
) -> None:
    alive, parameter = check(), weight()
    if alive is not None and parameter is not None:
        alive.compare(parameter, gradient)
