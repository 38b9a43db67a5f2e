"""What a step's calls of the model were made with, so that they can be made again.

A recorded call is run again on other parameters (dual numbers, or copies to differentiate by) and
gives what its losses were computed from. It gets the same arguments, buffers, autocast and random
numbers, and leaves none of them changed.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from kfac.hooks import silent_hooks

Selector = Callable[[Any], Tensor | None]
_PLAIN = (bool, int, float, str, type(None))
# Of each module by its name in the model, by their names in the module.
Buffers = Mapping[str, Mapping[str, Tensor | None]]
PlainAttributes = Mapping[str, Mapping[str, Any]]


class Kept(NamedTuple):
    """A tensor that must not be modified in place before it is used again."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept":
        """Keep a tensor, free of its graph."""
        tensor = tensor.detach()
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: If it was modified in place.
        """
        if not self.tensor.is_inference() and self.tensor._version != self.version:
            raise RuntimeError(
                "An argument, output or target of the model was modified in place between the "
                f"forward pass and the step (shape {tuple(self.tensor.shape)}), so the forward "
                "pass cannot be repeated. Modify a copy."
            )
        return self.tensor


class View(NamedTuple):
    """How a loss's input lies in one of the tensors that the model returned.

    Attributes:
        source: Which of them; -1 for the one that the selector picks or computes.
        layout: Strides of that tensor; None if the loss's input is all of it.
        size, stride, offset: Of the loss's input, the offset relative to that tensor.
    """

    source: int
    layout: tuple[int, ...] | None = None
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The same view of a tensor that was computed anew."""
        if self.layout is None:
            return tensor
        if tensor.stride() != self.layout:
            tensor = torch.empty_strided(
                tensor.shape, self.layout, dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, eq=False)
class RecordedLoss:
    """A call of the criterion that the backward pass has reached.

    Attributes:
        view: Where the model's output contains the criterion's input.
        output: The criterion's input.
        target: Its target, if known.
        share: What multiplies the Hessian of the summed loss.
        examples: Examples in the call of the model.
    """

    view: View
    output: Kept
    target: Kept | None
    share: Tensor | float
    examples: int

    def part(self, count: int, kept: int) -> "RecordedLoss | None":
        """The loss of the first ``kept`` of ``count`` examples; None if it cannot be told."""
        output, target, view = self.output.tensor, self.target, self.view
        if self.examples != count or not output.dim() or len(output) % count:
            return None
        terms = len(output) // count * kept
        if target is not None:
            if not target.tensor.dim() or len(target.tensor) != len(output):
                return None
            target = target._replace(tensor=target.tensor[:terms])
        if view.layout is not None:
            if view.stride[0] < max(view.stride):
                return None
            view = view._replace(size=(terms, *view.size[1:]))
        output_part = self.output._replace(tensor=output[:terms])
        return replace(self, output=output_part, target=target, view=view, examples=kept)


@dataclass(eq=False)
class RecordedCall:
    """One call of the model, and its losses.

    Attributes:
        args, kwargs: Arguments, their tensors kept free of graphs.
        buffers: Values before the call, by module and by name in the module.
        attributes: Likewise the numbers, strings and the like that modules have besides.
        random_states: Of the generators of the CPU (under None) and of other devices.
        autocast: By device type, whether it was on and its dtype.
        select: Picks the loss's input out of the model's output, where that was told.
        outputs: Tensors that the model returned.
        losses: What they were used for.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    buffers: Buffers
    attributes: PlainAttributes
    random_states: dict[torch.device | None, Tensor]
    autocast: dict[str, tuple[bool, torch.dtype]]
    select: Selector | None
    outputs: list[Kept] = field(default_factory=list)
    losses: list[RecordedLoss] = field(default_factory=list)

    @property
    def precision(self) -> float:
        """Machine epsilon of the least precise numbers that the call computes with."""
        dtypes = {dtype for enabled, dtype in self.autocast.values() if enabled}
        dtypes |= {loss.output.tensor.dtype for loss in self.losses}
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def part(self, fraction: float) -> tuple["RecordedCall", float]:
        """The call on the first of its examples.

        Args:
            fraction: How many of them, in (0, 1].

        Returns:
            The call, and the share of the examples that are in it: 1, and the call itself, where it
            is not known which axes hold the examples.
        """
        tensors = list(tensors_in(tree_map_only(Kept, Kept.get, (self.args, self.kwargs))))
        count = len(tensors[0]) if tensors and tensors[0].dim() else 0
        kept = max(1, round(fraction * count))
        losses = [loss.part(count, kept) for loss in self.losses]
        if kept >= count or any(loss is None for loss in losses):
            return self, 1.0

        def cut(value: Kept) -> Kept:
            has_examples = value.tensor.dim() > 0 and len(value.tensor) == count
            return value._replace(tensor=value.tensor[:kept]) if has_examples else value

        args, kwargs = tree_map_only(Kept, cut, (self.args, self.kwargs), is_leaf=_is_kept)
        call = replace(
            self, args=args, kwargs=kwargs, outputs=[cut(output) for output in self.outputs],
            losses=[loss for loss in losses if loss is not None],
        )  # fmt: skip
        return call, kept / count

    def run(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Call the model again, with other parameters.

        Args:
            model: The module without wrappers.
            parameters: Values for some or all parameters by name.

        Returns:
            The input of every loss.
        """
        args, kwargs = tree_map_only(Kept, Kept.get, (self.args, self.kwargs), is_leaf=_is_kept)
        with self._surroundings(), with_state(model, self.buffers, self.attributes):
            output = functional_call(model, dict(parameters), args, kwargs)
            tensors = list(tensors_in(output))
            if self.select is not None and any(loss.view.source < 0 for loss in self.losses):
                selected = self.select(output)
                assert selected is not None
                tensors.append(selected)  # the last one, -1
            return [loss.view.of(tensors[loss.view.source]) for loss in self.losses]

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """No hooks, compiled code or fused attention; autocast and random numbers as recorded."""
        with ExitStack() as stack:
            stack.enter_context(silent_hooks())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # others have one derivative
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for kind, (enabled, dtype) in self.autocast.items():
                cast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                stack.enter_context(cast)
            devices = [device for device in self.random_states if device is not None]
            stack.enter_context(torch.random.fork_rng(devices))
            for device, state in self.random_states.items():
                if device is None:
                    torch.set_rng_state(state)
                else:
                    torch.cuda.set_rng_state(state, device)
            yield


class Recorder:
    """Records the calls of a model, and keeps those with a loss until the step is over.

    Args:
        model: The module without wrappers.
        select: Picks the loss's input out of the model's output, where ``outputs=`` was given.

    Attributes:
        calls: Calls whose losses a backward pass has reached since the last step.
    """

    def __init__(self, model: nn.Module, select: Selector | None = None) -> None:
        self.calls: list[RecordedCall] = []
        self._model = model
        self._select = select

    def clear(self) -> None:
        """Forget all calls: the step is over, or given up."""
        self.calls.clear()

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RecordedCall:
        """Record how the model is called, before its forward pass; the caller keeps the result.

        Cost:
            Copies of the generators' states and of all buffers; waits for nothing.
        """
        kept_args, kept_kwargs = tree_map_only(Tensor, Kept.of, (args, dict(kwargs)))
        devices = {p.device for p in self._model.parameters()}
        states: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
        states |= {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
        kinds = {"cpu"} | {device.type for device in devices}
        return RecordedCall(
            kept_args,
            kept_kwargs,
            _copied({name: m._buffers for name, m in self._model.named_modules()}),
            {name: _plain_attributes(m) for name, m in self._model.named_modules()},
            states,
            {k: (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds},
            self._select,
        )

    def end(self, call: RecordedCall, output: Any) -> None:
        """Record what the model has returned."""
        call.outputs = [Kept.of(tensor) for tensor in tensors_in(output)]

    def add_loss(
        self,
        calls: Sequence[RecordedCall],
        output: Tensor,
        target: Tensor | None,
        *,
        share: Tensor | float = 1.0,
        examples: int = 1,
    ) -> None:
        """Record that a backward pass has reached a loss.

        Args:
            calls: The calls of the model behind the loss.
            output: What the criterion was called with.
            target: Its target, if known.
            share: What multiplies the Hessian of the summed loss.
            examples: Examples in the call of the model.

        Raises:
            RuntimeError: If ``output`` is not one of the tensors that the model returned, nor a
                view of one, nor what the selector computes.
        """
        kept, kept_target = Kept.of(output), None if target is None else Kept.of(target)
        for call in calls:
            view = _view_in(call, kept)
            if view is None and call.select is not None and len(calls) == 1:
                view = View(-1)
            if view is not None:
                call.losses.append(RecordedLoss(view, kept, kept_target, share, examples))
                if call not in self.calls:
                    self.calls.append(call)
                return
        raise RuntimeError(
            f"The input of the loss (shape {tuple(output.shape)}) is not what the model returned, "
            "nor a view of it, so the curvature along the step is unknown. Compute it inside of "
            "the model, or pass outputs= with the function from the model's output to it."
        )


def _copied(buffers: Buffers) -> Buffers:
    """Copies of buffers; what was one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def copied(buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        return copies.setdefault(id(buffer), buffer.detach().clone())

    return {
        module: {name: copied(buffer) for name, buffer in own.items()}
        for module, own in buffers.items()
        if own
    }


@contextmanager
def with_state(model: nn.Module, buffers: Buffers, attributes: PlainAttributes) -> Iterator[None]:
    """Within it, the modules have copies of these buffers, these plain attributes, and no others.

    A call may replace, reshape, register and delete buffers, which no list of names can undo, and
    modules that do so often remember in a number what they have.
    """
    now = [
        (name, module, dict(module._buffers), _plain_attributes(module))
        for name, module in model.named_modules()
    ]
    then = _copied(buffers)
    for name, module, _, _ in now:
        _replace(module, then.get(name, {}), attributes.get(name, {}))
    try:
        yield
    finally:
        for _, module, own, plain in now:
            _replace(module, own, plain)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if isinstance(value, _PLAIN)}


def _replace(
    module: nn.Module, buffers: Mapping[str, Tensor | None], attributes: Mapping[str, Any]
) -> None:
    module._buffers.clear()
    module._buffers.update(buffers)
    for key in _plain_attributes(module).keys() - attributes.keys():
        del module.__dict__[key]
    module.__dict__.update(attributes)


def _view_in(call: RecordedCall, tensor: Kept) -> View | None:
    """Which part of which output of a call a tensor is, if it is any."""
    for index, (whole, version) in enumerate(call.outputs):
        x = tensor.tensor
        if x.dtype != whole.dtype or version != tensor.version or not whole.numel():
            continue
        if x.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            continue
        offset = int(x.storage_offset() - whole.storage_offset())
        if offset == 0 and x.shape == whole.shape and x.stride() == whole.stride():
            return View(index)
        return View(index, whole.stride(), tuple(x.shape), tuple(x.stride()), offset)
    return None


def _is_kept(value: Any) -> bool:
    return isinstance(value, Kept)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))
