"""Linear layers whose weights are used without calling the module that holds them.

``nn.MultiheadAttention`` hands its projections' weights to one function, and so does the windowed
attention of Swin transformers: no hook of a linear module ever fires. Within such a module every
``F.linear`` is looked at, and the ones with a known weight are shown to the tap.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from kfac.compilation import HOOKS_BREAK_GRAPHS, not_compiled
from kfac.layers import Layer


@dataclass(frozen=True)
class Target:
    """A layer that a call of ``F.linear`` computes.

    Attributes:
        layer: The layer.
        columns: Which of the output's features are the layer's, None for all.
        batch: Where the leading axis is that of positions: size of the axis of examples behind it.
    """

    layer: Layer
    columns: slice | None = None
    batch: int | None = None

    def input(self, x: Tensor) -> Tensor:
        """The layer's input with the examples first."""
        if self.batch is None:
            return x
        return x.reshape(-1, self.batch, x.shape[-1]).transpose(0, 1)

    def gradient(self, g: Tensor) -> Tensor:
        """The gradient of the layer's own output, with the examples first."""
        return self.input(g if self.columns is None else g[..., self.columns])


# Targets of a call, its input, its output; returns the output to go on with.
OnCall = Callable[[Sequence[Target], Tensor, Tensor], Tensor]


class LinearCalls(TorchFunctionMode):
    """While entered, shows every ``F.linear`` on a weight of some layers.

    Inside of ``F.multi_head_attention_forward`` a mode sees nothing, because that function is
    itself what the mode is asked about; so a copy of it runs that finds ``linear`` here.

    Args:
        layers: The layers.
        on_call: A bound method; the object that it belongs to is not kept alive.
    """

    def __init__(self, layers: Iterable[Layer], on_call: OnCall) -> None:
        super().__init__()
        self._layers: dict[int, list[Layer]] = {}
        for layer in layers:
            known = self._layers.setdefault(id(layer.weight.parameter), [])
            if all(layer.weight.rows != other.weight.rows for other in known):
                known.append(layer)  # of tied layers the first stands for all
        self._on_call = weakref.WeakMethod(on_call)
        self._depth = 0
        self._batch: int | None = None

    def enter(self) -> None:
        """Begin to look, unless this has begun further out."""
        if self._depth == 0:
            self.__enter__()  # type: ignore[no-untyped-call]
        self._depth += 1

    def leave(self) -> None:
        """Undo one :meth:`enter`."""
        if self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def give_up(self) -> None:
        """Undo every :meth:`enter` of a forward pass that was interrupted."""
        if self._depth == 0:
            return
        self._depth = 0
        above: list[TorchFunctionMode] = []
        if any(mode is self for mode in _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            while (top := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
                above.append(top)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]

    @not_compiled(HOOKS_BREAK_GRAPHS)
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch's, by way of a tap where it is a known linear layer."""
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.multi_head_attention_forward and set(types) <= {Tensor, Parameter}:
            query: Tensor = args[0]
            self._batch = query.shape[1] if query.dim() == 3 else 1
            try:
                return self._attention_forward(*args, **kwargs)
            finally:
                self._batch = None
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(input, weight, bias)
        on_call, targets = self._on_call(), self._targets(weight, bias)
        if on_call is None or not targets:
            return output
        tapped: Tensor = on_call(targets, input, output)
        return tapped

    def _targets(self, weight: Tensor, bias: Tensor | None) -> list[Target]:
        """The layers that a weight, or a range of a packed weight's rows, belongs to."""
        whole = weight if id(weight) in self._layers or weight._base is None else weight._base
        layers = self._layers.get(id(whole))
        if not layers or weight.dim() != 2 or weight.stride() != whole.stride():
            return []
        first = (weight.storage_offset() - whole.storage_offset()) // max(weight.stride(0), 1)
        last = first + len(weight)
        targets = []
        for layer in layers:
            rows = layer.weight.rows or slice(0, len(whole))
            if first <= rows.start and rows.stop <= last and _has_bias_of(layer, bias):
                columns = slice(rows.start - first, rows.stop - first)
                is_all = columns == slice(0, len(weight))
                targets.append(Target(layer, None if is_all else columns, self._batch))
        return targets

    @cached_property
    def _attention_forward(self) -> Callable[..., Any]:
        return _with_globals(
            F.multi_head_attention_forward,
            has_torch_function=lambda _: False,
            linear=self._linear,
            **{
                name: _with_globals(getattr(F, name), linear=self._linear)
                for name in ("_in_projection", "_in_projection_packed")
            },
        )


def _has_bias_of(layer: Layer, bias: Tensor | None) -> bool:
    """Whether a call adds the bias that the layer's block contains, if it contains one."""
    if layer.bias is None:
        return True
    return bias is not None and any(layer.bias.parameter is b for b in (bias, bias._base))


def _with_globals(function: Any, **replacements: Any) -> Callable[..., Any]:
    """A copy of a Python function that finds other objects under some of its global names."""
    unknown = replacements.keys() - set(function.__code__.co_names)
    if unknown:
        raise RuntimeError(
            f"torch's {function.__name__} does not use {', '.join(sorted(unknown))} any more, so "
            "K-FAC cannot see its projections. Leave nn.MultiheadAttention out with skip=, or use "
            "a torch release that the documentation names."
        )
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **replacements},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
