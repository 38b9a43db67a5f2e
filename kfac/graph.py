"""Walks over autograd graphs."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge


def receives_gradient(parameter: nn.Parameter) -> bool:
    """Whether the backward pass that is under way computes a parameter's gradient.

    ``torch.autograd.grad(loss, input)`` does not, and so says nothing about the loss's curvature.
    """
    node = get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True  # the parameter is itself among the inputs of torch.autograd.grad


def mark_of(tensor: Tensor, key: str) -> Any:
    """The value attached to the node that made a tensor, None without one."""
    return None if tensor.grad_fn is None else _metadata(tensor.grad_fn).get(key)


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


def count_uses(tensors: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> Counter[str]:
    """How often each parameter enters the computation of some tensors.

    What a checkpointed or compiled region does inside is not seen.
    """
    names = {get_gradient_edge(p).node: name for name, p in parameters.items()}
    uses: Counter[str] = Counter()
    for node in _nodes_behind(tensors):
        uses.update(names[target] for target, _ in node.next_functions if target in names)
    return uses


def _nodes_behind(tensors: Sequence[Tensor]) -> Iterator[Node]:
    seen: set[Node] = set()
    queue = deque(t.grad_fn for t in tensors)
    while queue:
        node = queue.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            queue.extend(following for following, _ in node.next_functions)


def _metadata(node: Node) -> dict[str, Any]:
    return cast(dict[str, Any], node.metadata)
