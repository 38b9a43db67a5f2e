"""Walks over autograd graphs."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import Node, get_gradient_edge

Fate = Literal["accumulated", "returned", "none"]


def fate_of_gradient(parameter: nn.Parameter) -> Fate:
    """What the backward pass that is under way does with a parameter's gradient.

    ``loss.backward()`` accumulates it, ``torch.autograd.grad(loss, parameter)`` returns it, and
    ``torch.autograd.grad(loss, input)`` does not compute it.
    """
    node = get_gradient_edge(parameter).node
    try:
        return "accumulated" if torch._C._will_engine_execute_node(node) else "none"
    except RuntimeError:
        return "returned"  # torch does not tell this of what it returns


def reaches_every_leaf() -> bool:
    """Whether the backward pass that is under way was started by ``loss.backward()``.

    Ask in a hook. Only such a pass may enter regions under reentrant checkpointing: torch refuses
    ``torch.autograd.grad`` and ``backward(inputs=...)`` there.
    """
    if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]
        return False
    # Where the pass ends at the hook's tensor, which it returns, the answer above is not of it.
    node = torch._C._current_autograd_node()
    following = [] if node is None else [n for n, _ in node.next_functions if n is not None]
    return not following or any(map(torch._C._will_engine_execute_node, following))


def current_pass() -> int | None:
    """Identifies the backward pass that is under way, the innermost one; None outside of any."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def mark_of_running_node(key: str) -> Any:
    """The value attached to the node that the backward pass is at, None without one."""
    node = torch._C._current_autograd_node()
    return None if node is None else _metadata(node).get(key)


def mark_of(tensor: Tensor, key: str, *, through: type[Function] | None = None) -> Any:
    """The value attached to the node that made a tensor, None without one.

    Args:
        tensor: The tensor.
        key: Key of the value.
        through: Identities in its first argument, behind which the node may be.
    """
    node = tensor.grad_fn
    while node is not None:
        value = _metadata(node).get(key)
        if value is not None or through is None or getattr(node, "_forward_cls", None) != through:
            return value
        node = node.next_functions[0][0]
    return None


def mark(tensor: Tensor, key: str, value: object) -> None:
    """Attach a value to the node that made a tensor: the node owns it, not the other way round."""
    if tensor.grad_fn is not None:
        _metadata(tensor.grad_fn)[key] = value


def marks_behind(tensor: Tensor, key: str) -> list[Any]:
    """The values of the nearest marked nodes that a tensor was computed from, each once."""
    found: list[Any] = []
    seen: set[Node] = set()
    queue = deque([tensor.grad_fn])
    while queue:
        node = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        value = _metadata(node).get(key)
        if value is None:
            queue.extend(following for following, _ in node.next_functions)
        elif not any(value is other for other in found):
            found.append(value)
    return found


def mark_functions(
    tensors: Sequence[Tensor],
    key: str,
    value: object,
    *,
    border: str,
    besides: tuple[type[Function], ...],
) -> set[str]:
    """Attach a value to every ``torch.autograd.Function`` that tensors were computed by.

    Args:
        tensors: The tensors.
        key: Key of the value; functions that have one keep theirs.
        value: The value.
        border: Nodes with a value under this key, and what lies behind them, are left out.
        besides: Functions that are left out.

    Returns:
        The names of all others.
    """
    found: set[str] = set()
    for node in _nodes_behind(tensors, border):
        function = getattr(node, "_forward_cls", None)
        if function is not None and not issubclass(function, besides):
            found.add(function.__name__)
            _metadata(node).setdefault(key, value)
    return found


def count_uses(tensors: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> Counter[str]:
    """How often each parameter enters the computation of some tensors.

    What a checkpointed or compiled region does inside is not seen.
    """
    names = {get_gradient_edge(p).node: name for name, p in parameters.items()}
    uses: Counter[str] = Counter()
    for node in _nodes_behind(tensors):
        uses.update(names[target] for target, _ in node.next_functions if target in names)
    return uses


def _nodes_behind(tensors: Sequence[Tensor], border: str | None = None) -> Iterator[Node]:
    seen: set[Node] = set()
    queue = deque(t.grad_fn for t in tensors)
    while queue:
        node = queue.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            if border is not None and border in _metadata(node):
                continue
            yield node
            queue.extend(following for following, _ in node.next_functions)


def _metadata(node: Node) -> dict[str, Any]:
    return cast(dict[str, Any], node.metadata)
