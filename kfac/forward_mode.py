"""Forward mode for the operations that a network spends its time in.

torch's own rules compute the primal value again for every direction, and the derivative of a
BatchNorm out of a dozen small operations. Here the primal values are computed once for all
directions, the two terms of a product rule where possible by one call, and BatchNorm by the one
kernel that torch has for its backward pass.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


@cache
def load_forward_mode() -> None:
    """Have torch set up its forward mode, which warns of a deprecation within torch."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        dual(torch.zeros(1), torch.zeros(1))


_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}


class SharedPrimals(TorchFunctionMode):
    """While entered, convolutions, linear layers and BatchNorm map dual numbers by rules of ours.

    Enter it once for every direction, for the same forward pass with the same primal values:
    operations are told apart by their order. Every other operation is torch's own.

    Args:
        keep: Whether primal values are kept from one direction to the next. A result that was
            modified in place, as by ``nn.ReLU(inplace=True)``, is computed again.
    """

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self._keep = keep
        self._kept: list[tuple[tuple[Tensor, ...], int]] = []  # with the version at first
        self._next = 0

    def __enter__(self) -> "SharedPrimals":
        self._next = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch's, by a rule of ours if it has one for these arguments."""
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            return self._convolution(func, *args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    # --- rules ---------------------------------------------------------------------------------

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x Wᵀ + b: ẏ = ẋ Wᵀ + x Ẇᵀ + ḃ."""
        return self._bilinear(F.linear, input, weight, bias)

    def _convolution(
        self,
        convolution: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """Likewise; one convolution of [ẋ, x] by [W, Ẇ] gives both terms."""

        def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return convolution(x, w, b, stride, padding, dilation, groups)

        channels = 1 - weight.dim() if groups == 1 else None
        return self._bilinear(apply, input, weight, bias, channels)

    def _bilinear(
        self,
        apply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        channels: int | None = None,
    ) -> Tensor:
        """An operation that is linear in its input and, for itself, in weight and bias.

        Args:
            apply: The operation.
            input, weight, bias: Its arguments, dual or not.
            channels: Axis of the input over which sums run, where the weight's is axis 1 and
                inputs can be concatenated along it.
        """
        x, dx = parts(input)
        w, dw = parts(weight)
        b, db = _optional_parts(bias)
        (y,) = self._primal(lambda: (apply(x, w, b),))
        if dx is not None and dw is not None and channels is not None:
            both_x, both_w = torch.cat([dx, x], channels), torch.cat([w, dw], 1)
            return dual(y, apply(both_x, both_w, db))
        terms = []
        if dw is not None or db is not None:
            terms.append(apply(x, torch.zeros_like(w) if dw is None else dw, db))
        if dx is not None:
            terms.append(apply(dx, w, None))
        if not terms:
            return y
        return dual(y, terms[0] if len(terms) == 1 else terms[0].add_(terms[1]))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """y = γ x̂ + β: ẏ = (∂y/∂x) ẋ + γ̇ x̂ + β̇, where ∂y/∂x is symmetric."""
        x, dx = parts(input)
        w, dw = _optional_parts(weight)
        b, db = _optional_parts(bias)
        has_rule = training and x.dtype in (torch.float32, torch.float64)
        if not has_rule or (w is not None and w.dtype != x.dtype):
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        y, mean, scale = self._primal(
            lambda: torch.native_batch_norm(x, w, b, running_mean, running_var, True, momentum, eps)
        )
        if dx is None:
            dy = torch.zeros_like(x)
        else:
            dy, _, _ = torch.ops.aten.native_batch_norm_backward(
                dx, x, w, None, None, mean, scale, True, eps, [True, False, False]
            )
        by_channel = (-1, *[1] * (x.dim() - 2))
        if dw is not None:
            slope = dw * scale
            dy.addcmul_(x, slope.view(by_channel)).sub_((mean * slope).view(by_channel))
        if db is not None:
            dy.add_(db.view(by_channel))
        return dual(y, dy)

    def _primal(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What the operation that is next in the forward pass gives for primal values."""
        index, self._next = self._next, self._next + 1
        if index < len(self._kept):
            result, version = self._kept[index]
            if result[0]._version == version:
                return result
        result = compute()
        if self._keep and index == len(self._kept):
            self._kept.append((result, result[0]._version))
        return result


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A dual number."""
    made: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return made


def parts(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """The primal value of a dual number, and its tangent; None where it has none."""
    primal, tangent = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return primal, tangent


def _optional_parts(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if value is None else parts(value)
