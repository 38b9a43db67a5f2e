"""What can be trained: the ``params=`` argument, and what no step could take."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from kfac.arguments import argument_error

_PARAMS = "a list or an iterator of parameters, of which some require gradients"
_LEAVE_OUT = "or train it with another optimizer and leave it out of params="
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def entries(owner: str, model: nn.Module, params: Any) -> list[Any]:
    """The entries of a ``params=`` argument: parameters, or what an optimizer takes besides.

    Args:
        owner: Class name for error messages.
        model: The model, all of whose parameters are taken for None.
        params: An iterable or None.

    Raises:
        ValueError: If it is something else, or there are none.
    """
    found = _listed(owner, model.parameters() if params is None else params)
    if not found and params is None:
        raise argument_error(
            owner, "model", "a module with parameters", f"a {type(model).__name__} without any",
            "There is nothing to train; a quantised module holds none.",
        )  # fmt: skip
    if not found:
        raise argument_error(owner, "params", _PARAMS, params, "A generator is empty once used.")
    return found


def checked_params(owner: str, model: nn.Module, params: Any) -> list[nn.Parameter]:
    """Return the parameters of a ``params=`` argument as a list; as :func:`entries`.

    Raises:
        ValueError: If there is something else, a parameter comes twice, is of a kind that cannot be
            trained with K-FAC, or all of them are frozen.
    """
    given = entries(owner, model, params)
    if not all(isinstance(p, Tensor) for p in given):
        raise argument_error(owner, "params", _PARAMS, params, "Pass model.parameters().")
    refuse_twice(owner, given)
    if not any(p.requires_grad for p in given):
        raise argument_error(
            owner, "params", _PARAMS, f"{len(given)} frozen ones",
            "Thaw what is to be trained with requires_grad_(True).",
        )  # fmt: skip
    _refuse_modules(owner, model, {id(p) for p in given if p.requires_grad})
    _refuse_kinds(owner, model, given)
    return given


def members_of(owner: str, group: Any) -> list[Any]:
    """The parameters of a parameter group, where they have names as pairs.

    Raises:
        ValueError: If there are none, or it is no group.
    """
    given = group.get("params") if isinstance(group, dict) else group
    found = [given] if isinstance(given, Tensor) else _listed(owner, given)
    if not found or not all(isinstance(p, Tensor) for p in unnamed(found)):
        raise argument_error(
            owner, "params", "dicts whose 'params' are parameters", given,
            "Pass model.parameters(); a generator is empty once used.",
        )  # fmt: skip
    return found


def _listed(owner: str, params: Any) -> list[Any]:
    if not isinstance(params, Iterable) or isinstance(params, Tensor | str | Mapping | Set):
        raise argument_error(owner, "params", _PARAMS, params, "Pass model.parameters().")
    return list(params)


def refuse_strangers(owner: str, model: nn.Module, params: Sequence[Tensor]) -> None:
    """Refuse parameters of which none is the model's: they are those of another one, or a copy."""
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for p in params):
        raise argument_error(
            owner, "params", "parameters of the model",
            f"{len(params)} of which none is, the first of shape {tuple(params[0].shape)}",
            "Pass model.parameters() of this very model, not of a copy.",
        )  # fmt: skip


def refuse_meta(owner: str, params: Sequence[Tensor]) -> None:
    """Refuse to train parameters without memory, which can be looked at but not trained."""
    for parameter in params:
        if parameter.is_meta and parameter.requires_grad:
            raise argument_error(
                owner, "model", "in memory when it is trained",
                f"a parameter of shape {tuple(parameter.shape)} on the meta device",
                "Call model.to_empty(device=...) and initialise the weights before constructing "
                "the optimizer: it makes new parameters.",
            )  # fmt: skip


def refuse_twice(owner: str, params: Sequence[Tensor]) -> None:
    """Refuse a parameter that would be moved twice in a step."""
    twice = [p for p, count in Counter(params).items() if count > 1]
    if twice:
        raise argument_error(
            owner, "params", "parameters that come once",
            f"{len(twice)} that come twice, the first of shape {tuple(twice[0].shape)}",
            "Put each of them into one group.",
        )  # fmt: skip


def unnamed(given: Iterable[Any]) -> list[Any]:
    """The parameters of a group, whether they have names or not."""
    return [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in given]


def _refuse_modules(owner: str, model: nn.Module, trained: Set[int]) -> None:
    """Refuse modules that would make the first step fail."""
    for name, module in model.named_modules():
        remedy = _module_remedy(module, trained)
        if remedy:
            where = f"{name!r}, a " if name else "a "
            raise argument_error(
                owner, "model", "one whose calls and gradients K-FAC can follow",
                f"{where}{type(module).__name__}", remedy,
            )  # fmt: skip


def _refuse_kinds(owner: str, model: nn.Module, params: Sequence[Tensor]) -> None:
    """Refuse parameters that would make the first step fail."""
    for parameter in params:
        problem = _problem(parameter) if parameter.requires_grad else None
        if problem is not None:
            kind, remedy = problem
            names = [repr(name) for name, p in model.named_parameters() if p is parameter]
            raise argument_error(
                owner, "params", "dense tensors of real numbers in memory",
                f"{''.join(names[:1])} {kind}".strip(), remedy,
            )  # fmt: skip


def _module_remedy(module: nn.Module, trained: Set[int]) -> str | None:
    """What to do about a module that K-FAC cannot follow, None if it can."""
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
        return "FSDP shards the weights: use DistributedDataParallel, which keeps them whole."
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        return (
            "Its copies of the model, made anew in each call, have no hooks: use "
            "DistributedDataParallel, or device_ids=[0]."
        )
    is_sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    if is_sparse and id(module.weight) in trained:
        return f"K-FAC takes no sparse gradients: construct it with sparse=False, {_LEAVE_OUT}."
    return None


def _problem(parameter: Tensor) -> tuple[str, str] | None:
    """What a parameter is that cannot be trained, and what to do; None if it can be."""
    if hasattr(parameter, "__tensor_flatten__") or parameter.is_nested:
        return f"of type {type(parameter).__name__}", (
            "Sharded, quantised and nested tensors are not supported. In place of FSDP and tensor "
            f"parallelism use DistributedDataParallel, which keeps weights whole, {_LEAVE_OUT}."
        )
    if parameter.layout != torch.strided:
        return f"of layout {parameter.layout}", f"Make it dense, {_LEAVE_OUT}."
    if parameter.dtype not in _DTYPES:
        choices = ", ".join(map(str, _DTYPES))
        return f"of dtype {parameter.dtype}", f"Convert it to one of {choices}, {_LEAVE_OUT}."
    return None
