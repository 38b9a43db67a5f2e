"""The pieces that sit in a model and in its autograd graph, and only call back."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kfac.compilation import HOOKS_BREAK_GRAPHS, not_compiled

# Input of the tapped layer, gradient of its output, what this returned at the last visit.
OnGradient = Callable[[Tensor, Tensor, object], object]
# The model's output and the loss's target.
OnReached = Callable[[Tensor, Tensor | None], None]

_COPY = "ToCopyBackward0"  # autograd's name for a copy in another dtype or on another device


class Tap(torch.autograd.Function):
    """Identity on a layer's output that shows each gradient passing through, with the input.

    The scalar probe is an input only so that ``torch.autograd.grad(output, probe, vector)`` visits
    all taps and nothing else. The layer's input is saved the way autograd saves its own tensors,
    so activation checkpointing and in-place checks apply to it.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, probe: Tensor, x: Tensor, on_gradient: OnGradient
    ) -> Tensor:
        """Mark the output as modified in place: no copy, and later in-place use stays legal."""
        ctx.save_for_backward(x)
        ctx.on_gradient = on_gradient
        ctx.last = None
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(output)
        return output

    @not_compiled(HOOKS_BREAK_GRAPHS)
    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        """Show the gradient, and pass it on as it is."""
        if gradient is not None:
            (x,) = ctx.saved_tensors
            ctx.last = ctx.on_gradient(x, gradient, ctx.last)
        return gradient, None, None, None


class OutputTap(torch.autograd.Function):
    """Identity on the criterion's input that tells when the user's backward pass reaches it.

    It sits downstream of the output that it saves, so the graph owns it and not the other way
    round: an evaluation that never calls backward leaves nothing behind.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor | None, on_reached: OnReached) -> Tensor:
        """Save the output, still attached to its graph, and the target."""
        ctx.save_for_backward(output, target)
        ctx.on_reached = on_reached
        ctx.set_materialize_grads(False)
        return output.view_as(output)

    @not_compiled(HOOKS_BREAK_GRAPHS)
    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        """Announce the user's backward pass."""
        if gradient is not None:
            ctx.on_reached(*ctx.saved_tensors)
        return gradient, None, None


class ModuleHook:
    """A module hook that copies and pickles as one that does nothing.

    A deep copy of the model (an exponential moving average, say) takes its hooks along; those
    must neither feed the original's statistics nor drag its optimizer into the copy.

    Args:
        module: The only module that this hook reacts to.
        method: Called with ``arguments`` and what torch passes to the hook after the module. The
            object that the method belongs to is not kept alive: without it the hook is dead.
        arguments: See there.
    """

    _silent = False  # of all hooks; a plain class attribute, since a model may run on many threads

    def __init__(
        self,
        module: nn.Module | None = None,
        method: Callable[..., Any] | None = None,
        *arguments: Any,
    ) -> None:
        self.module = module
        self.method = None if method is None else weakref.WeakMethod(method)
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @not_compiled(HOOKS_BREAK_GRAPHS)
    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Call back, if this hook is alive, on its own module and not in a ``torch.func`` one."""
        method = None if self.method is None else self.method()
        if method is None or module is not self.module:
            return None
        if ModuleHook._silent or torch._C._are_functorch_transforms_active():
            return None
        return method(*self.arguments, *arguments)


class Switch:
    """Whether hooks call back in compiled code.

    Attributes:
        on: That.
    """

    def __init__(self, *, on: bool) -> None:
        self.on = on


class LayerHook(ModuleHook):
    """A hook that ``torch.compile`` traces, and that leaves nothing in the graph if switched off.

    Args:
        switch: Whether it calls back in compiled code; without gradients it never does there.
        module, method, arguments: As of :class:`ModuleHook`.
    """

    def __init__(
        self,
        switch: Switch | None = None,
        module: nn.Module | None = None,
        method: Callable[..., Any] | None = None,
        *arguments: Any,
    ) -> None:
        super().__init__(module, method, *arguments)
        self.switch = switch

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Call back, unless a graph is made that has to stay whole."""
        is_on = self.switch is not None and self.switch.on and torch.is_grad_enabled()
        if torch.compiler.is_compiling() and not is_on:
            return None
        return super().__call__(module, *arguments)


@contextmanager
def silent_hooks() -> Iterator[None]:
    """Within it, no hook of this package reacts: a model runs as if it had none."""
    before, ModuleHook._silent = ModuleHook._silent, True
    try:
        yield
    finally:
        ModuleHook._silent = before


class _GradientHook:
    """Calls a bound method back, whose object it does not keep alive."""

    def __init__(self, method: MethodType, arguments: tuple[Any, ...]) -> None:
        self.method = weakref.WeakMethod(method)
        self.arguments = arguments

    @not_compiled(HOOKS_BREAK_GRAPHS)
    def __call__(self, gradient: Any) -> None:
        """A gradient is known."""
        method = self.method()
        if method is not None:
            method(*self.arguments)


def on_backward(tensor: Tensor, method: Callable[..., None], *arguments: Any) -> None:
    """Call a bound method when the gradient of ``tensor`` is known.

    Of a copy in another dtype or on another device, that of what it is a copy of: a model that
    computes its loss itself may return its outputs converted, off the way to the loss.

    Only a weak reference to the method's object goes into the graph.
    """
    assert isinstance(method, MethodType)
    hook = _GradientHook(method, arguments)

    node = tensor.grad_fn
    if node is None or node.name() != _COPY:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        return
    while node.name() == _COPY:
        source = node.next_functions[0][0]
        assert source is not None  # what is copied requires a gradient
        node = source
    node.register_prehook(hook)


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a call by position or, failing that, by name."""
    return args[position] if len(args) > position else kwargs.get(name)
