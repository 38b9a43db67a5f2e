"""Which parameters K-FAC takes, which the fallback trains, and a table that says so."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from kfac.arguments import argument_error
from kfac.layers import Layer, WeightSharing, layer_type_for, supported_base

Skip = str | type[nn.Module]
SharingRule = WeightSharing | Callable[[str, nn.Module], str]

# What wrappers put into the names of a module's children.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


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


def clean_name(name: str) -> str:
    """Strip the prefixes that DDP, ``torch.compile``, checkpointing and FSDP wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


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
    trained_ids = {id(p) for p in trained}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    skipped = _Skipped(owner, skip, model)
    layers, reasons = [], {}
    for raw_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        name = clean_name(raw_name)
        _refuse_lazy(owner, name, own)
        reason = skipped.reason(name) or _obstacle(module, own, trained_ids, uses)
        if reason is None:
            bias = own.get("bias")
            if bias is not None and (id(bias) not in trained_ids or uses[id(bias)] > 1):
                reasons[f"{name}.bias"] = "its weight is under K-FAC without it: " + (
                    "shared by several modules" if uses[id(bias)] > 1 else "not trained"
                )
                bias = None
            layer_type = layer_type_for(module)
            assert layer_type is not None
            layers.append(
                layer_type(
                    name,
                    module,
                    weight_sharing=_sharing(owner, weight_sharing, name, module),
                    weight=own["weight"],
                    bias=bias,
                    max_factor_dim=max_factor_dim,
                    identity_g=identity_g,
                )
            )
        else:
            reasons |= {f"{name}.{p}".lstrip("."): reason for p in own}
    skipped.check_all_used()
    return layers, reasons


def _obstacle(
    module: nn.Module,
    own: dict[str, nn.Parameter],
    trained_ids: set[int],
    uses: Counter[int],
) -> str | None:
    """Why K-FAC does not take a module, None if it does."""
    if layer_type_for(module) is None:
        base = supported_base(module)
        if base is not None:
            return f"a subclass of {base.__name__} may compute something else"
        return f"{type(module).__name__} is not supported"
    weight = own.get("weight")
    if weight is None:
        return "its weight is not a parameter (parametrised)"
    if not weight.requires_grad or id(weight) not in trained_ids:
        return "its weight is not trained"
    if uses[id(weight)] > 1:
        return "its weight is shared by several modules"
    return None


class _Skipped:
    """The ``skip=`` argument, and which of its entries have matched something.

    An entry that matches a module covers everything inside it.
    """

    def __init__(self, owner: str, entries: Sequence[Skip], model: nn.Module) -> None:
        self.owner = owner
        self.entries = list(entries)
        self.unused = list(entries)
        self.modules = {clean_name(name): module for name, module in model.named_modules()}

    def reason(self, name: str) -> str | None:
        parts = name.split(".")
        lineage = [".".join(parts[: i + 1]) for i in range(len(parts))]
        for entry in self.entries:
            if any(self._matches(entry, ancestor) for ancestor in lineage):
                self.unused = [e for e in self.unused if e is not entry]
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
    trained: Iterable[nn.Parameter],
    expanded: Iterable[str],
) -> Summary:
    """Describe how every parameter of the model is trained."""
    owner_layer = {id(p): layer for layer in layers for p in layer.parameters}
    trained_ids = {id(p) for p in trained}
    return Summary(_rows(model, owner_layer, reasons, trained_ids, set(expanded)))


def _rows(
    model: nn.Module,
    owner_layer: dict[int, Layer],
    reasons: dict[str, str],
    trained_ids: set[int],
    expanded: set[str],
) -> Iterator[Row]:
    modules = {clean_name(name): type(m).__name__ for name, m in model.named_modules()}
    for raw_name, parameter in model.named_parameters():
        name = clean_name(raw_name)
        module = modules[name.rpartition(".")[0]]
        layer = owner_layer.get(id(parameter))
        row = (name, tuple(parameter.shape), module)
        if id(parameter) not in trained_ids or not parameter.requires_grad:
            why = "frozen" if not parameter.requires_grad else "not given to the optimizer"
            yield Row(*row, "untrained", reason=why)
        elif layer is None:
            yield Row(*row, "fallback", reason=reasons.get(name, "added after construction"))
        elif not layer.weight.requires_grad:
            yield Row(*row, "fallback", reason="its weight is not trained")
        else:
            shapes = layer.shape.factor_shapes().items()
            factors = ", ".join(f"{k} {'×'.join(map(str, s))}" for k, s in shapes)
            note = "expanded: its leading size is no multiple of the batch size"
            yield Row(*row, "kfac", factors, note if layer.name in expanded else "")
