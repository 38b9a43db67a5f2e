"""What a parameter group may set: checked when the group is added, and again whenever it is used.

Schedulers and training loops write into the groups, so a value that was good at construction need
not be good any more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac.arguments import (
    BOOLEAN,
    NON_NEGATIVE,
    POSITIVE,
    UNIT_INTERVAL,
    Constraint,
    argument_error,
    check,
    nearest,
)

# Schedules that end at zero may miss it by rounding.
_ROUNDING = 1e-12


def _is_rate(value: object) -> bool:
    is_rounded_zero = isinstance(value, float) and -_ROUNDING < value < 0
    return is_rounded_zero or NON_NEGATIVE.accepts(value)


def _is_lr(value: object, *, waits: bool) -> bool:
    """Whether a value is a learning rate; one on an accelerator is only read if that may wait."""
    if not isinstance(value, Tensor):
        return _is_rate(value)
    is_number = value.is_floating_point() and value.numel() == 1 and not value.is_meta
    is_read = is_number and (waits or value.device.type == "cpu")
    return _is_rate(value.item()) if is_read else is_number


def _or_auto(constraint: Constraint) -> Constraint:
    return Constraint(
        f"{constraint.text} or 'auto'",
        lambda v: v == "auto" if isinstance(v, str) else constraint.accepts(v),
    )


_LR_TEXT = "a finite number >= 0, a tensor with one such element"
_SETTINGS = {
    "lr": Constraint(_LR_TEXT, lambda v: _is_lr(v, waits=True)),
    "momentum": UNIT_INTERVAL,
    "nesterov": BOOLEAN,
    "weight_decay": NON_NEGATIVE,
    "maximize": BOOLEAN,
    "damping": POSITIVE,
}
_REMEDIES = {
    "lr": "Common values are 1e-3 to 0.1.",
    "momentum": "Common values are 0 and 0.9.",
    "nesterov": "It needs momentum > 0.",
    "weight_decay": "Pass 0 for none.",
    "maximize": "Pass True to ascend.",
}
WHEN_ADDED = _SETTINGS | {key: _or_auto(_SETTINGS[key]) for key in ("lr", "momentum")}
_LR_IN_USE = Constraint(_LR_TEXT, lambda v: _is_lr(v, waits=False))
_IN_USE = _SETTINGS | {"lr": _LR_IN_USE}
_IN_USE_AUTOMATIC = _IN_USE | {
    "lr": _or_auto(_LR_IN_USE),
    "momentum": _or_auto(UNIT_INTERVAL),
    "nesterov": Constraint("False in automatic steps", lambda v: v is False),
    "maximize": Constraint("False in automatic steps", lambda v: v is False),
}
# What torch itself, its schedulers and those of other libraries keep in groups.
_OF_OTHERS = {
    "params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "max_momentum",
    "base_momentum", "swa_lr", "lr_scale",
}  # fmt: skip


def refuse_unknown(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a group sets something that no group can set."""
    for key in group.keys() - _SETTINGS.keys() - _OF_OTHERS:
        raise argument_error(
            "KFAC", "params", f"groups that set only {', '.join(sorted(_SETTINGS))}",
            f"{key!r} in a group",
            nearest(str(key), _SETTINGS) or "What holds for all groups is an argument of KFAC.",
        )  # fmt: skip


def check_added(settings: Mapping[str, Any]) -> None:
    """Check the settings of a group that is added; its damping may be a schedule, left alone.

    Raises:
        ValueError: If one violates its constraint.
    """
    for key, remedy in _REMEDIES.items():
        check("KFAC", key, settings[key], WHEN_ADDED[key], remedy)
    _check_nesterov(settings)


def check_in_use(groups: Sequence[Mapping[str, Any]], *, is_automatic: bool) -> None:
    """Check the settings that a step is about to use, without waiting for an accelerator.

    Raises:
        ValueError: If one violates its constraint.
    """
    constraints = _IN_USE_AUTOMATIC if is_automatic else _IN_USE
    for group in groups:
        for key, constraint in constraints.items():
            if not constraint.accepts(group.get(key)):
                raise argument_error(
                    "KFAC", key, constraint.text, group.get(key), _remedy(group.get(key))
                )
        _check_nesterov(group)


def _remedy(value: object) -> str:
    """What to do about a setting of a group that was changed after construction."""
    if value == "auto":
        return "Automatic steps are chosen at construction: pass it to KFAC."
    return "It was edited in a parameter group, by hand or by a scheduler: set it right there."


def _check_nesterov(settings: Mapping[str, Any]) -> None:
    if settings["nesterov"] and settings["momentum"] == 0:
        raise argument_error(
            "KFAC", "nesterov", "False without momentum", True, "Pass momentum=0.9, say."
        )


def with_usable_rates(accept: Tensor, groups: Sequence[Mapping[str, Any]]) -> Tensor:
    """``accept``, a boolean scalar, but False where a learning rate is not finite or negative.

    Those on an accelerator are not read by :func:`check_in_use`, which would wait for it.
    """
    for group in groups:
        if isinstance(group["lr"], Tensor):
            rate = group["lr"].to(accept.device).reshape(())
            accept = accept & rate.isfinite() & (rate > -_ROUNDING)
    return accept


def check_same(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse groups that differ where a quadratic model chooses one step for all of them.

    Raises:
        ValueError: If a setting other than the weight decay is not that of all groups.
    """
    for key in ("lr", "momentum", "nesterov", "maximize", "damping"):
        if settings[key] != defaults[key]:
            raise argument_error(
                "KFAC", "params", f"groups with {key}={defaults[key]!r}", settings[key],
                "A step that a quadratic model chooses is the same for all groups; they may "
                "differ in weight_decay.",
            )  # fmt: skip
