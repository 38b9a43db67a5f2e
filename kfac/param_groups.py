"""Which parameters K-FAC takes, and why not the others."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import nn

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
