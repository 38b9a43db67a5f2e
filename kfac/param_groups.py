"""Which parameters K-FAC takes, which the fallback trains, and a table that says so."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kfac.arguments import Constraint, argument_error
from kfac.layers import Layer, Piece, WeightSharing, layer_type_for, supported_base

Skip = str | type[nn.Module]
SharingRule = WeightSharing | Callable[[str, nn.Module], str]

SKIP = Constraint(
    "a sequence of module names, globs or types",
    lambda v: (
        isinstance(v, (list, tuple, set, frozenset))
        and all(isinstance(e, str) or (isinstance(e, type) and issubclass(e, nn.Module)) for e in v)
    ),
)

# Names that wrappers give to what they wrap, beside the common "module" of the parallel ones.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Row:
    """How one parameter is trained.

    Attributes:
        parameter: Dotted name, free of wrappers' prefixes.
        shape: Its shape.
        module: Type of the module that owns it.
        treatment: "kfac", "fallback" or "untrained".
        factors: Shapes of A and G for "kfac", such as "A 1×28×28, G 1×10×10".
        reason: Why, where the treatment is not "kfac" or the setting is not the one asked for.
    """

    parameter: str
    shape: tuple[int, ...]
    module: str
    treatment: str
    factors: str = ""
    reason: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for dim in self.shape:
            size *= dim
        return size


class Summary(Sequence[Row]):
    """One row per parameter; prints as a table."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def fraction(self, treatment: str) -> float:
        """Fraction of all parameter elements with this treatment."""
        total = sum(row.size for row in self.rows)
        return sum(r.size for r in self.rows if r.treatment == treatment) / max(total, 1)

    def __str__(self) -> str:
        header = ("parameter", "shape", "module", "trained by", "factors", "why")
        cells = [header] + [
            (r.parameter, "×".join(map(str, r.shape)), r.module, r.treatment, r.factors, r.reason)
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        shares = (f"{self.fraction(t):.1%} {t}" for t in ("kfac", "fallback", "untrained"))
        return "\n".join([*lines, "of all parameters: " + ", ".join(shares)])

    __repr__ = __str__


def clean_names(model: nn.Module) -> dict[str, str]:
    """Names of all modules without what DDP, ``torch.compile`` and other wrappers put into them.

    Returns:
        From the name in ``model.named_modules()`` to the clean one.
    """
    clean = {"": ""}
    parents = {"": model}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent, _, leaf = name.rpartition(".")
        parents[name] = module
        is_wrapper = leaf in _WRAPPERS or (
            leaf == "module" and isinstance(parents[parent], DistributedDataParallel | DataParallel)
        )
        clean[name] = clean[parent] if is_wrapper else f"{clean[parent]}.{leaf}".lstrip(".")
    return clean


def _joined(module: str, parameter: str) -> str:
    return f"{module}.{parameter}".lstrip(".")


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
        max_factor_dim: A factor larger than this keeps only its diagonal.
        identity_g: Keep no G.

    Returns:
        The layers, and why each remaining parameter is not under K-FAC, by clean name.

    Raises:
        ValueError: If a skip entry matches nothing, a weight-sharing rule returns something else,
            or the model has uninitialised lazy parameters.
    """
    trainable = {id(p) for p in trained if p.requires_grad}
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    names = clean_names(model)
    skipped = _Skipped(owner, skip, {names[raw]: module for raw, module in model.named_modules()})
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for raw_name, module in model.named_modules():
        name, own = names[raw_name], dict(module.named_parameters(recurse=False))
        _refuse_lazy(owner, name, own)
        layer_type = layer_type_for(module)
        reason = skipped.reason(name) or _unsupported(module)
        if reason is not None or layer_type is None:
            reasons |= {_joined(name, p): str(reason) for p in own}
            continue
        reasons |= {_joined(name, p): "not part of a linear layer" for p in own}
        for part in layer_type.parts(module):
            if part.weight not in own and getattr(module, part.weight, None) is None:
                continue
            reason = _obstacle(own.get(part.weight), trainable, uses)
            if reason is not None:
                reasons |= {_joined(name, p): reason for p in (part.weight, part.bias) if p in own}
                continue
            bias, bias_reason = _own_bias(own.get(part.bias), trainable, uses)
            reasons[_joined(name, part.bias)] = bias_reason
            layers.append(
                layer_type(
                    _joined(name, part.suffix) if part.suffix else name,
                    module,
                    weight_sharing=_sharing(owner, weight_sharing, name, module),
                    weight=Piece(own[part.weight], part.weight_rows),
                    bias=None if bias is None else Piece(bias, part.bias_rows),
                    max_factor_dim=max_factor_dim,
                    identity_g=identity_g,
                )
            )
    skipped.check_all_used()
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


def _obstacle(weight: nn.Parameter | None, trainable: set[int], uses: Counter[int]) -> str | None:
    """Why K-FAC does not take a weight, None if it does."""
    if weight is None:
        return "its weight is not a parameter (parametrised)"
    if id(weight) not in trainable:
        return "its weight is not trained"
    if uses[id(weight)] > 1:
        return "its weight is shared by several modules"
    return None


def _own_bias(
    bias: nn.Parameter | None, trainable: set[int], uses: Counter[int]
) -> tuple[nn.Parameter | None, str]:
    """The bias that is trained together with its weight, or why there is none."""
    if bias is None or id(bias) not in trainable:
        return None, "its weight is under K-FAC without it: not trained at construction"
    if uses[id(bias)] > 1:
        return None, "its weight is under K-FAC without it: shared by several modules"
    return bias, ""


def checked_params(owner: str, params: Any) -> list[nn.Parameter]:
    """Return the parameters of a ``params=`` argument as a list.

    Raises:
        ValueError: If it is no iterable of parameters, or all of them are frozen.
    """
    constraint = "an iterable of parameters, of which some require gradients"
    given = None if isinstance(params, Tensor) else list(params)
    if not given or not all(isinstance(p, Tensor) for p in given):
        raise argument_error(owner, "params", constraint, params, "Pass model.parameters().")
    if not any(p.requires_grad for p in given):
        raise argument_error(owner, "params", constraint, f"{len(given)} frozen ones")
    return given


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

    def check_all_used(self) -> None:
        if self.unused:
            raise argument_error(
                self.owner, "skip", "names, globs or types of modules in the model", self.unused[0],
                "Nothing matches it; see model.named_modules().",
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
        f"(for the module {name!r})",
    )  # fmt: skip


def summarize(
    model: nn.Module,
    layers: Sequence[Layer],
    reasons: dict[str, str],
    trained: Sequence[nn.Parameter],
    expanded: set[str],
) -> Summary:
    """Describe how every parameter of the model, and every other that is trained, is trained."""
    owners: dict[int, list[Layer]] = {}
    for layer in layers:
        for parameter in layer.parameters:
            owners.setdefault(id(parameter), []).append(layer)
    trained_ids = {id(p) for p in trained}
    names, modules = clean_names(model), dict(model.named_modules())
    rows = []
    for raw_name, parameter in model.named_parameters():
        path, _, leaf = raw_name.rpartition(".")
        name, shape = _joined(names[path], leaf), tuple(parameter.shape)
        treatment, factors, why = _treatment(
            parameter, owners.get(id(parameter), []), reasons.get(name), trained_ids, expanded
        )
        rows.append(Row(name, shape, type(modules[path]).__name__, treatment, factors, why))
    inside = {id(p) for p in model.parameters()}
    for number, parameter in enumerate(p for p in trained if id(p) not in inside):
        name, why = f"(outside the model) {number}", "not part of the model"
        rows.append(Row(name, tuple(parameter.shape), "", "fallback", reason=why))
    return Summary(rows)


def _treatment(
    parameter: nn.Parameter,
    layers: Sequence[Layer],
    reason: str | None,
    trained_ids: set[int],
    expanded: set[str],
) -> tuple[str, str, str]:
    """How a parameter is trained, the shapes of its factors, and why."""
    if id(parameter) not in trained_ids:
        return "untrained", "", "not given to the optimizer"
    if not parameter.requires_grad:
        return "untrained", "", "frozen"
    if not layers:
        return "fallback", "", reason or "added after construction"
    if not all(layer.is_trained for layer in layers):
        return "fallback", "", "its weight is not trained"
    note = "expanded: its leading size is no multiple of the batch size"
    is_expanded = any(layer.name in expanded for layer in layers)
    return "kfac", _factors(layers), note if is_expanded else ""


def _factors(layers: Sequence[Layer]) -> str:
    """Shapes of the factors of the layers that a parameter is part of."""
    texts = Counter(
        ", ".join(
            f"{name} {'×'.join(map(str, shape))}"
            for name, shape in layer.shape.factor_shapes().items()
        )
        for layer in layers
    )
    return "; ".join(f"{n} of {text}" if n > 1 else text for text, n in texts.items())
