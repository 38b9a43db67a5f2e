"""Where taps sit: on the outputs of modules that are called, and of linear calls without one."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac.graph import mark, mark_of
from kfac.hooks import ModuleHook, Tap
from kfac.layers import Layer
from kfac.linear_calls import LinearCalls, Target
from kfac.statistics import ForwardRecord
from kfac.uses import Uses

# Of a tap: its targets, the call of the model, whether it was made during a backward pass, the
# layer's input, the gradient of its output, what this returned at the last visit.
Visit = Callable[[Sequence[Target], ForwardRecord | None, bool, Tensor, Tensor, object], object]


class Taps:
    """Puts a tap on the output of every layer, while statistics are due.

    Args:
        model: The outermost module that the user calls.
        layers: The layers under K-FAC.
        visit: A bound method, called when a gradient arrives at a tap. The object that it belongs
            to is not kept alive.
        key: Under which a tap is marked in the metadata of its node.

    Attributes:
        active: Whether statistics are due.
        record: The latest call of the model.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], visit: Visit, key: str) -> None:
        self.active = True
        self.record: ForwardRecord | None = None
        self._visit = weakref.WeakMethod(visit)
        self._mark = f"{key} tapped"
        self._probes: dict[torch.device, Tensor] = {}
        self._uses: Uses | None = Uses()  # until the first forward has been checked
        self._linear_calls = LinearCalls(
            [layer for layer in layers if layer.calls_linear], self._tap_linear
        )
        # Linear layers next to each other, and the hooks on the module that holds them.
        self._looking: list[tuple[list[Layer], list[RemovableHandle]]] = []
        self._handles = [self._register(layer) for layer in layers if not layer.is_functional]
        self._handles += self._register_looks(model, layers)

    def _register(self, layer: Layer) -> RemovableHandle:
        hook = ModuleHook(layer.module, self._tap_call, layer)
        # First in line: what other hooks make of the output is not the layer's own output.
        return layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def _register_looks(self, model: nn.Module, layers: Sequence[Layer]) -> list[RemovableHandle]:
        """Watch the modules that may use linear layers' weights without calling the layers."""
        handles = []
        for module in model.modules():
            children = set(module.children())
            nearby = [
                layer
                for layer in layers
                if (layer.calls_linear and layer.module in children)
                or (layer.is_functional and layer.module is module)
            ]
            if not nearby or type(module) is nn.Sequential:
                continue
            before, after = ModuleHook(module, self._look), ModuleHook(module, self._look_away)
            pair = [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True),
            ]
            self._looking.append((nearby, pair))
            handles += pair
        return handles

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.active = False

    def probe(self, device: torch.device) -> Tensor:
        """The scalar that every tap on a device takes as an input."""
        if device not in self._probes:
            self._probes[device] = torch.zeros((), device=device, requires_grad=True)
        return self._probes[device]

    def unseen_weights(self, outputs: Sequence[Tensor]) -> list[nn.Parameter]:
        """After the first forward, warn of uses that were not seen; stop looking where all were.

        Args:
            outputs: What the model has returned.

        Returns:
            The weights that were warned of.
        """
        if not self.active or self._uses is None or not self._uses.taps:
            return []
        unseen = self._uses.warn_of_unseen(outputs)
        for children, handles in self._looking:
            if self._uses.were_only_called(children):
                for handle in handles:
                    handle.remove()
        self._uses = None
        return unseen

    def _tap_call(
        self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        """A layer's module was called: put a tap on its output if its statistics are due."""
        if not (self._is_due(layer, output) and layer.module.weight is layer.weight.parameter):
            return None
        if self._uses is not None:
            self._uses.add_call(layer)
        if mark_of(output, self._mark):
            return None  # the call inside of the module was seen
        x = layer.observed(args, kwargs)
        problem = layer.problem_of_call(x, output)
        if problem is not None:
            raise RuntimeError(problem)
        return self._tap([Target(layer.as_called())], x, output)

    def _tap_linear(self, targets: Sequence[Target], x: Tensor, output: Tensor) -> Tensor:
        """``F.linear`` was called with a layer's weight: likewise."""
        due = [target for target in targets if self._is_due(target.layer, output)]
        return self._tap(due, x, output) if due else output

    def _is_due(self, layer: Layer, output: Tensor) -> bool:
        recorded = torch.is_grad_enabled() and output.requires_grad
        return self.active and recorded and layer.is_trained

    def _tap(self, targets: Sequence[Target], x: Tensor, output: Tensor) -> Tensor:
        recomputed = torch._C._current_graph_task_id() != -1
        visit = self._visit()
        if visit is None:
            return output
        on_gradient = partial(visit, targets, self.record, recomputed)
        if self.record is not None:
            self.record.taps.update(target.layer.primary.name for target in targets)
        if self._uses is not None:
            self._uses.add_taps(target.layer for target in targets)
        tapped: Tensor = Tap.apply(output, self.probe(output.device), x.detach(), on_gradient)
        mark(tapped, self._mark, True)
        return tapped

    def _look(self, *_: Any) -> None:
        """A module that may use a linear layer's weight without calling it has been entered."""
        if self.active:
            self._linear_calls.enter()

    def _look_away(self, *_: Any) -> None:
        self._linear_calls.leave()
