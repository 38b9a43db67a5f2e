"""A table that says how every parameter is trained, and why."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from kfac.layers import Layer
from kfac.names import clean_names, joined


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
        name, shape = joined(names[path], leaf), tuple(parameter.shape)
        members = owners.get(id(parameter), [])
        treatment, factors, why = _treatment(
            parameter, members, reasons.get(name), trained_ids, expanded
        )
        if treatment == "kfac" and any(layer.primary is not layer for layer in members):
            others = [layer.name for layer in members if layer.module is not modules[path]]
            why = "; ".join(filter(None, [f"one block with {', '.join(others)}", why]))
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
    note = "expanded: its leading axis does not tell the examples"
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
        if layer.primary is layer
    )
    return "; ".join(f"{n} of {text}" if n > 1 else text for text, n in texts.items())
