"""Where taps sit: on the outputs of modules that are called, and of linear calls without one."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac.graph import current_pass, mark, mark_functions, mark_of, mark_of_running_node
from kfac.hooks import LayerHook, OutputTap, Switch, Tap
from kfac.layers import Layer
from kfac.linear_calls import LinearCalls, Target
from kfac.statistics import ForwardRecord
from kfac.uses import Uses

# Of a tap: its targets, the call of the model, whether it was made during a backward pass, the
# layer's input, the gradient of its output, what this returned at the last visit.
Visit = Callable[[Sequence[Target], ForwardRecord | None, bool, Tensor, Tensor, object], object]

# The name of torch's function for it, and of the variants of other libraries.
_CHECKPOINT = "CheckpointFunction"


class Taps:
    """Puts a tap on the output of every layer, while statistics are due.

    Args:
        model: The outermost module that the user calls.
        layers: The layers under K-FAC.
        visit: A bound method, called when a gradient arrives at a tap. The object that it belongs
            to is not kept alive.
        key: Under which a tap is marked in the metadata of its node.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], visit: Visit, key: str) -> None:
        self._switch = Switch(on=True)
        weakref.finalize(self, setattr, self._switch, "on", False)
        self._record: ForwardRecord | None = None  # of the latest call of the model
        self._in_call = False
        # Of the call whose region is, or was last, run again by reentrant checkpointing.
        self._recomputed: ForwardRecord | None = None
        # Output of the last call of a layer without gradients, within the call under way.
        self._last_hidden: weakref.ref[Tensor] | None = None
        # Blocks whose layers it has called without gradients, and with them.
        self._hidden: set[str] = set()
        self._shown: set[str] = set()
        self._visit = weakref.WeakMethod(visit)
        self._key = key
        self._mark = f"{key} tapped"
        self._region = f"{key} region"
        self._probes: dict[torch.device, Tensor] = {}
        self._uses: Uses | None = Uses()  # until the first forward has been checked
        self._linear_calls = LinearCalls(
            [layer for layer in layers if layer.calls_linear], self._tap_linear
        )
        # Linear layers next to each other, and the hooks on the module that holds them.
        self._looking: list[tuple[list[Layer], list[RemovableHandle]]] = []
        self._handles = [self._register(layer) for layer in layers if not layer.is_functional]
        self._handles += self._register_looks(model, layers)

    @property
    def active(self) -> bool:
        """Whether statistics are due."""
        return self._switch.on

    @active.setter
    def active(self, active: bool) -> None:
        self._switch.on = active

    def _register(self, layer: Layer) -> RemovableHandle:
        hook = LayerHook(self._switch, layer.module, self._tap_call, layer)
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
            before = LayerHook(self._switch, module, self._look)
            after = LayerHook(self._switch, module, self._look_away)
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

    def begin_call(self, record: ForwardRecord) -> None:
        """The model is called, with gradients enabled."""
        self._record, self._in_call, self._recomputed = record, True, None
        self._last_hidden, self._hidden, self._shown = None, set(), set()

    def give_up(self, *_: Any) -> None:
        """No call is under way; the last one may have been interrupted, with no hook called."""
        self._in_call = False
        self._linear_calls.give_up()

    def end_call(self, outputs: Sequence[Tensor]) -> None:
        """The call is over.

        Args:
            outputs: What of its outputs requires a gradient.
        """
        self._in_call = False
        if self._record is not None and self._hidden:
            # Reentrant checkpointing is such a function: it calls the layers again.
            functions = mark_functions(
                outputs, self._region, self._record, border=self._key, besides=(Tap, OutputTap)
            )
            is_checkpointed = _CHECKPOINT in functions
            self._record.is_recomputed = is_checkpointed or (
                bool(functions) and not self._hidden <= self._shown
            )

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
        if not self._is_own_weight(layer):
            return None
        self._note_call([layer], output)
        if not self._is_due(layer, output):
            return None
        if self._uses is not None:
            self._uses.add_call(layer)
        if mark_of(output, self._mark, through=Tap):  # of another optimizer's
            return None  # the call inside of the module was seen
        _refuse_nested(layer, [*args, *kwargs.values(), output])
        x = layer.observed(args, kwargs)
        problem = layer.problem_of_call(x, output)
        if problem is not None:
            raise RuntimeError(problem)
        return self._tap([Target(layer.as_called())], x, output)

    def _tap_linear(self, targets: Sequence[Target], x: Tensor, output: Tensor) -> Tensor:
        """``F.linear`` was called with a layer's weight: likewise."""
        self._note_call([target.layer for target in targets], output)
        due = [target for target in targets if self._is_due(target.layer, output)]
        if not due:
            return output
        if self._in_call and self._record is not None:
            self._record.has_own_weights = True
        _refuse_nested(due[0].layer, [x, output])
        return self._tap(due, x, output)

    def _is_own_weight(self, layer: Layer) -> bool:
        """Whether a call uses the weight that is trained; note it, if it may be trained."""
        is_own = layer.module.weight is layer.weight.parameter
        if self._in_call and self._record is not None and torch.is_grad_enabled():
            self._record.has_own_weights |= is_own
            self._record.has_other_weights |= not is_own
        return is_own

    def _note_call(self, layers: Iterable[Layer], output: Tensor) -> None:
        """Layers were called: without gradients, perhaps by checkpointing that calls them again."""
        trained = [layer.primary.name for layer in layers if layer.is_trained]
        if torch.is_grad_enabled():
            if self._in_call:
                self._shown.update(trained)
            return
        if not trained:
            return
        if not self._in_call:
            self._record_of_call()  # a region inside of another one, which is told here
            return
        if self._last_hidden is not None and self._last_hidden() is output:
            return  # the call inside of the module was seen
        self._last_hidden = weakref.ref(output)
        self._hidden.update(trained)
        if self._record is not None:
            self._record.uses.update(trained)

    def _is_due(self, layer: Layer, output: Tensor) -> bool:
        recorded = torch.is_grad_enabled() and output.requires_grad
        return self.active and recorded and layer.is_trained

    def _record_of_call(self) -> ForwardRecord | None:
        """The call of the model that a call of a layer belongs to."""
        if current_pass() is None or self._in_call:
            return self._record
        # A region inside of another one has no mark: the outer one has just been met.
        self._recomputed = mark_of_running_node(self._region) or self._recomputed
        if self._recomputed is not None:
            self._recomputed.is_recomputed = True
        return self._recomputed or self._record

    def _tap(self, targets: Sequence[Target], x: Tensor, output: Tensor) -> Tensor:
        visit = self._visit()
        if visit is None:
            return output
        record, recomputed = self._record_of_call(), current_pass() is not None
        if record is not None and (self._in_call or not recomputed):
            record.uses.update(target.layer.primary.name for target in targets)
        on_gradient = partial(visit, targets, record, recomputed)
        if self._uses is not None:
            self._uses.add_taps(target.layer for target in targets)
        tapped: Tensor = Tap.apply(output, self.probe(output.device), x.detach(), on_gradient)
        mark(tapped, self._mark, True)
        return tapped

    def _look(self, *_: Any) -> None:
        """A module that may use a linear layer's weight without calling it has been entered."""
        if self.active and self._may_train:
            self._linear_calls.enter()

    def _look_away(self, *_: Any) -> None:
        if self._may_train:
            self._linear_calls.leave()

    @property
    def _may_train(self) -> bool:
        """Whether layers that are called now may be called to train them.

        Otherwise torch should not even be looked at: it has faster ways that it takes unobserved.
        """
        return torch.is_grad_enabled() or self._in_call


def _refuse_nested(layer: Layer, values: Sequence[Any]) -> None:
    """Nested tensors have no rectangle of examples and positions to take moments over."""
    if any(isinstance(value, Tensor) and value.is_nested for value in values):
        raise RuntimeError(
            f"The layer {layer.name!r} was called with a nested tensor, which K-FAC cannot take "
            "statistics of. Pad the sequences (and pass position_mask=), or leave the layer to the "
            "fallback with skip=."
        )
