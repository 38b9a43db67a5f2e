"""Which parameters K-FAC takes, and why not the others."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from kfac.arguments import Constraint, argument_error, nearest
from kfac.layers import Layer, WeightSharing, layer_type_for, supported_base
from kfac.names import clean_names, joined
from kfac.ties import Candidate, layers_of, sharing_one_weight

Skip = str | type[nn.Module]
SharingRule = WeightSharing | Callable[[str, nn.Module], str]

SKIP = Constraint(
    "a sequence of module names, globs or types",
    lambda v: (
        isinstance(v, (list, tuple, set, frozenset))
        and all(isinstance(e, str) or (isinstance(e, type) and issubclass(e, nn.Module)) for e in v)
    ),
)


def find_layers(
    model: nn.Module,
    trained: Iterable[nn.Parameter],
    *,
    owner: str,
    skip: Sequence[Skip],
    weight_sharing: SharingRule,
    max_factor_dim: int,
    identity_g: bool,
) -> tuple[list[Layer], dict[str, str]]:
    """Find the modules that K-FAC takes, and the reason for every other parameter.

    Args:
        model: The outermost module.
        trained: The parameters that the optimizer was given.
        owner: Class name for error messages.
        skip: Names, globs or types of modules to leave to the fallback.
        weight_sharing: A setting, or a function of name and module that returns one.
        max_factor_dim: See :func:`kfac.layers.base.factor_kind`.
        identity_g: Keep no G.

    Returns:
        The layers, and why each remaining parameter is not under K-FAC, by clean name.

    Raises:
        ValueError: If a skip entry matches nothing, a weight-sharing rule returns something else,
            or the model has uninitialised lazy parameters.
    """
    trainable = {id(p) for p in trained if p.requires_grad}
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    names = clean_names(model)
    module_names = {module: names[raw] for raw, module in model.named_modules()}
    skipped = _Skipped(owner, skip, {names[raw]: module for raw, module in model.named_modules()})
    candidates: list[Candidate] = []
    reasons: dict[str, str] = {}
    for raw_name, module in model.named_modules():
        name, own = names[raw_name], dict(module.named_parameters(recurse=False))
        _refuse_lazy(owner, name, own)
        layer_type = layer_type_for(module)
        reason = skipped.reason(name) or _unsupported(module)
        if reason is not None or layer_type is None:
            reasons |= {joined(name, p): str(reason) for p in own}
            continue
        reasons |= {joined(name, p): "not part of a linear layer" for p in own}
        sharing = _sharing(owner, weight_sharing, name, module)
        for part in layer_type.parts(module):
            weight, bias = own.get(part.weight), own.get(part.bias)
            if weight is None and getattr(module, part.weight, None) is None:
                continue
            reason = _obstacle(weight, trainable)
            if weight is None or reason is not None:
                reasons |= {joined(name, p): str(reason) for p in {part.weight, part.bias} & {*own}}
                continue
            reasons[joined(name, part.bias)] = "its weight is under K-FAC without it: " + (
                "shared by several modules"
                if bias is not None and id(bias) in trainable
                else "not trained at construction"
            )
            trained_bias = bias if id(bias) in trainable else None
            full_name = joined(name, part.suffix) if part.suffix else name
            candidates.append(
                Candidate(full_name, module, layer_type, part, sharing, weight, trained_bias)
            )
    skipped.check_all_used()
    layers: list[Layer] = []
    for members in sharing_one_weight(candidates):
        found = layers_of(members, holders, max_factor_dim=max_factor_dim, identity_g=identity_g)
        if isinstance(found, list):
            layers += found
            continue
        for member in members:
            parameters = {member.part.weight, member.part.bias}
            reasons |= {joined(module_names[member.module], p): found for p in parameters}
    return layers, reasons


def _unsupported(module: nn.Module) -> str | None:
    """Why K-FAC does not take a module, None if it does."""
    layer_type = layer_type_for(module)
    if layer_type is not None:
        return layer_type.refusal(module)
    base = supported_base(module)
    if base is not None:
        return f"a subclass of {base.__name__} may compute something else"
    return f"{type(module).__name__} is not supported"


def _obstacle(weight: nn.Parameter | None, trainable: set[int]) -> str | None:
    """Why K-FAC does not take a weight, None if it does."""
    if weight is None:
        return "its weight is not a parameter (parametrised)"
    if id(weight) not in trainable:
        return "its weight is not trained"
    return None


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


_PARAMS = "a list or an iterator of parameters, of which some require gradients"
_LEAVE_OUT = "or train it with another optimizer and leave it out of params="


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
    if parameter.is_meta:
        return "on the meta device", (
            "Construct the optimizer once the weights are there: call "
            "model.to_empty(device=...), and initialise or load them."
        )
    if parameter.layout != torch.strided:
        return f"of layout {parameter.layout}", f"Make it dense, {_LEAVE_OUT}."
    if parameter.dtype not in _DTYPES:
        choices = ", ".join(map(str, _DTYPES))
        return f"of dtype {parameter.dtype}", f"Convert it to one of {choices}, {_LEAVE_OUT}."
    return None


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Skipped:
    """The ``skip=`` argument, and which of its entries have matched something.

    An entry that matches a module covers everything inside it.
    """

    def __init__(self, owner: str, entries: Sequence[Skip], modules: dict[str, nn.Module]) -> None:
        self.owner = owner
        self.entries = list(entries)
        self.unused = list(entries)
        self.modules = modules

    def reason(self, name: str) -> str | None:
        parts = name.split(".")
        lineage = [".".join(parts[: i + 1]) for i in range(len(parts))]
        matching = [e for e in self.entries if any(self._matches(e, above) for above in lineage)]
        self.unused = [entry for entry in self.unused if entry not in matching]
        for entry in matching:
            return f"skip={entry!r}" if isinstance(entry, str) else f"skip={entry.__name__}"
        return None

    def _matches(self, entry: Skip, name: str) -> bool:
        if isinstance(entry, str):
            return fnmatch.fnmatchcase(name, entry)
        return isinstance(self.modules[name], entry)

    def _nearest(self, entry: Skip) -> str:
        if isinstance(entry, str):
            return nearest(entry, self.modules)
        return nearest(entry.__name__, {type(m).__name__ for m in self.modules.values()})

    def check_all_used(self) -> None:
        if self.unused:
            raise argument_error(
                self.owner, "skip", "names, globs or types of modules in the model", self.unused[0],
                self._nearest(self.unused[0]) or "Nothing matches it; see model.named_modules().",
            )  # fmt: skip


def _refuse_lazy(owner: str, name: str, own: dict[str, nn.Parameter]) -> None:
    for parameter in own.values():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise argument_error(
                owner, "model", "initialised", f"a lazy parameter in {name!r}",
                "Run one forward pass before constructing the optimizer.",
            )  # fmt: skip


def _sharing(owner: str, rule: SharingRule, name: str, module: nn.Module) -> WeightSharing:
    chosen = rule(name, module) if callable(rule) else rule
    if chosen == "expand":
        return "expand"
    if chosen == "reduce":
        return "reduce"
    raise argument_error(
        owner, "weight_sharing", "'expand', 'reduce' or a function returning one of them", chosen,
        f"That is for the module {name!r}.",
    )  # fmt: skip
