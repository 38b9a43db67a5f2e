"""How K-FAC and ``torch.compile`` get along.

A hook that calls back cannot be part of a graph, and a compiled backward pass is one block that a
Fisher pass cannot enter. So a forward pass that statistics are taken from runs without compiled
code, wherever ``torch.compile`` was applied. In all others the hooks of layers are traced and leave
nothing in the graph.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

set_eval_frame: Callable[[Any], Any]
try:
    # There is no public way to leave compiled code for longer than one function.
    from torch._C._dynamo.eval_frame import set_eval_frame

    _CAN_LEAVE = True
except ImportError:
    _CAN_LEAVE = False

    def set_eval_frame(callback: Any) -> Any:
        """Nothing: compiled code that calls the model goes on, with gaps for the hooks."""


Function = TypeVar("Function")

HOOKS_BREAK_GRAPHS = (
    "K-FAC's hooks need a gap in the graph here, which fullgraph=True forbids. Compile the model "
    "before K-FAC sees it, KFAC(torch.compile(model, fullgraph=True)), and call the criterion and "
    "optimizer.step() outside of compiled code; or compile without fullgraph=True; or call "
    "optimizer.remove_hooks() when training is over."
)
STEP_BREAKS_GRAPHS = (
    "K-FAC's step makes decisions that a graph cannot hold: with fullgraph=True, call "
    "optimizer.zero_grad() and optimizer.step() outside of compiled code; or compile without "
    "fullgraph=True."
)


def not_compiled(reason: str, *, recursive: bool = True) -> Callable[[Function], Function]:
    """A decorator for methods that graphs leave out.

    Args:
        reason: What to do where a graph may not have gaps; torch >= 2.7 shows it.
        recursive: Whether that holds for what the method calls, too.
    """

    def decorate(function: Function) -> Function:
        return cast(Function, _NotCompiled(function, reason, recursive=recursive))

    return decorate


class _NotCompiled:
    """Stands for a method of a class until hooks are made, or until it is looked up.

    torch's decorator imports torch's compiler. The package can do without until then.
    """

    _all: ClassVar[list["_NotCompiled"]] = []

    def __init__(self, function: Any, reason: str, *, recursive: bool) -> None:
        self._function = function
        self._reason = reason
        self._is_recursive = recursive

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name
        self._all.append(self)

    def __get__(self, instance: object, owner: type) -> Any:
        self._take_effect()
        return getattr(owner if instance is None else instance, self._name)

    def _take_effect(self) -> None:
        is_static = isinstance(self._function, staticmethod)
        function = self._function.__func__ if is_static else self._function
        disable: Any = torch.compiler.disable
        knows_reason = "reason" in inspect.signature(disable).parameters
        options = {"reason": self._reason} if knows_reason else {}
        disabled = disable(function, recursive=self._is_recursive, **options)
        setattr(self._owner, self._name, staticmethod(disabled) if is_static else disabled)

    @classmethod
    def take_effect(cls) -> None:
        """Put torch's own in the place of all; what is traced has to find them."""
        while cls._all:
            cls._all.pop()._take_effect()


def compiled_parts(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and what is compiled on its own in it."""
    yield model
    for module in model.modules():
        is_compiled = getattr(module, "_compiled_call_impl", None) is not None
        if module is not model and (is_compiled or hasattr(module, "_orig_mod")):
            yield module


class EagerForward:
    """Runs the forward passes of a module without compiled code where that is asked for.

    It takes effect where compiled code is called by the module (``torch.compile(model)``, a
    compiled part) and where the module is called by it (``model.compile()``, a compiled training
    step). Hooks of the module that come later run without compiled code, too.

    Args:
        module: The module.
        is_wanted: A bound method, asked before every forward pass. The object that it belongs to is
            not kept alive.

    Attributes:
        handles: Of the hooks.
    """

    # Of all modules, since one may be within another: how many are in such a forward pass, and what
    # held before the first.
    _depth: ClassVar[int] = 0
    _stance: ClassVar[Any] = None
    _callback: ClassVar[Any] = None

    def __init__(self, module: nn.Module, is_wanted: Callable[[], bool]) -> None:
        _NotCompiled.take_effect()
        self._is_wanted = weakref.WeakMethod(is_wanted)
        self._is_under_way = False
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(_Switch(module, self._begin), prepend=True),
            module.register_forward_hook(_Switch(module, self._end), always_call=True),
        ]

    def __del__(self) -> None:
        self.give_up()

    def _begin(self, callback: Any) -> Any:
        """A forward pass begins; returns the evaluation of frames to go on with."""
        self._end_pass()
        is_wanted = self._is_wanted()
        if is_wanted is None or not (torch.is_grad_enabled() and is_wanted()):
            return callback
        if _forbids_gaps(callback):
            raise RuntimeError(HOOKS_BREAK_GRAPHS)
        if EagerForward._depth == 0:
            EagerForward._stance = torch.compiler.set_stance("force_eager")
            EagerForward._callback = callback
        EagerForward._depth += 1
        self._is_under_way = True
        return None

    def _end(self, callback: Any) -> Any:
        """A forward pass is over; likewise."""
        if not self._is_under_way:
            return callback
        before = EagerForward._callback
        self._end_pass()
        return before if EagerForward._depth == 0 else None

    def give_up(self) -> None:
        """End a forward pass that was interrupted."""
        if self._is_under_way:
            callback = set_eval_frame(None)
            self._end_pass()
            set_eval_frame(callback)

    def _end_pass(self) -> None:
        if self._is_under_way:
            self._is_under_way = False
            EagerForward._depth -= 1
            if EagerForward._depth == 0:
                EagerForward._stance.__exit__(None, None, None)
                EagerForward._stance = EagerForward._callback = None


class _Switch:
    """A module hook that may switch torch.compile's evaluation of frames off, or on again.

    A copy does nothing.
    """

    def __init__(
        self, module: nn.Module | None = None, method: Callable[[Any], Any] | None = None
    ) -> None:
        self.module = module
        self.method = None if method is None else weakref.WeakMethod(method)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @not_compiled(HOOKS_BREAK_GRAPHS, recursive=not _CAN_LEAVE)
    def __call__(self, module: nn.Module, *_: Any) -> None:
        method = None if self.method is None else self.method()
        if method is not None and module is self.module:
            callback = set_eval_frame(None)  # an error leaves it off, until compiled code is left
            set_eval_frame(method(callback))


def _forbids_gaps(callback: Any) -> bool:
    """Whether frames are evaluated with ``fullgraph=True``, as far as torch lets that be seen."""
    names = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")  # the latter: torch 2.6
    return any(type(getattr(callback, n, None)).__name__ == "ConvertFrameAssert" for n in names)
