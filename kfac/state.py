"""The state of the whole optimizer: torch's part and that of everything beside it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from kfac.arguments import Constraint
from kfac.automatic import AutomaticStep
from kfac.checkpoint import (
    MAPPING,
    NUMBER,
    check_contents,
    check_keys,
    check_tensor,
    check_value,
    contents,
)
from kfac.fallback import Fallback, different_fallback
from kfac.grafting import Graft
from kfac.names import clean_names, joined
from kfac.preconditioner import Preconditioner


@dataclass(frozen=True)
class Parts:
    """What of :class:`kfac.KFAC` has state besides torch's "state" and "param_groups".

    Attributes:
        groups: The optimizer's parameter groups, by whose order parameters are numbered.
        settings: What the settings of a group may be, by name.
        engine: Factors, inverses, seed and counters: "kfac".
        graft: Keeps its averages in "state".
        automatic: "automatic", where the quadratic model chooses the steps.
        fallback: "fallback", if there is one.
    """

    groups: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Constraint]
    engine: Preconditioner
    graft: Graft | None
    automatic: AutomaticStep | None
    fallback: Fallback | None

    def state_dict(self, state: Mapping[int, Any], kl_clip_scale: float) -> dict[str, Any]:
        """The state of every part, by its name.

        Args:
            state: Torch's part, by number of the parameter.
            kl_clip_scale: ν of the last step.
        """
        found: dict[str, Any] = {
            "kfac": self.engine.state_dict(),
            "update": {
                "kl_clip_scale": kl_clip_scale,
                "shapes": self._shapes,
                "held": contents(state),
            },
        }
        if self.fallback is not None:
            found["fallback"] = self.fallback.state_dict(self.groups)
        if self.automatic is not None:
            found["automatic"] = self.automatic.state_dict()
        return found

    def load(self, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Load what :meth:`checked` returned.

        Args:
            saved: The state.
            optimizer: Whose parts these are; torch loads its part of the state.
        """
        if self.fallback is not None:
            # First, since an optimizer of the user's own may refuse.
            self.fallback.load_state_dict(saved.get("fallback"), self.groups)
        own = {"state": copy.deepcopy(saved["state"]), "param_groups": saved["param_groups"]}
        torch.optim.Optimizer.load_state_dict(optimizer, own)
        if self.graft is not None:
            self.graft.load(self.groups, optimizer.state, saved)
        self.engine.load_checked(saved["kfac"])
        if self.automatic is not None:
            self.automatic.load_state_dict(saved["automatic"])

    # --- checks --------------------------------------------------------------------------------

    def checked(self, state_dict: Any, *, strict: bool) -> dict[str, Any]:
        """Return the state in the present format if it can be loaded; changes nothing.

        Args:
            state_dict: A state dict of the optimizer.
            strict: Whether the same layers, and the same parameters of the fallback, have to be on
                both sides.

        Raises:
            ValueError: If the state does not fit or is damaged; the message says what and where.
        """
        theirs: Any = state_dict.get("kfac") if isinstance(state_dict, Mapping) else None
        saved = dict(state_dict) if isinstance(state_dict, Mapping) else {}
        saved["kfac"] = self.engine.checked_state(theirs, strict=strict)
        if theirs["version"] == 1:
            saved = self._upgraded(saved)
        self._check_parts(saved, strict=strict)
        self._check_groups(saved["param_groups"])
        self._check_state(saved["state"], saved["update"])
        if self.automatic is not None:
            self.automatic.check_loadable(saved["automatic"], saved["param_groups"])
        if self.fallback is not None and "fallback" in saved:
            self.fallback.check_loadable(
                saved["fallback"], self.groups, self._called, strict=strict
            )
        return saved

    def _upgraded(self, saved: dict[str, Any]) -> dict[str, Any]:
        """State of version 1 of the format with the entries that version 2 has added."""
        known = {
            "kl_clip_scale": 1.0, "shapes": self._shapes, "held": contents(saved.get("state"))
        }  # fmt: skip
        saved = {"update": known} | saved
        if self.fallback is not None and "fallback" in saved:
            saved["fallback"] = self.fallback.upgraded(saved["fallback"], self.groups)
        return saved

    def _check_parts(self, saved: Mapping[str, Any], *, strict: bool) -> None:
        if ("automatic" in saved) != (self.automatic is not None):
            relations = ("is", "is not") if self.automatic is None else ("is not", "is")
            raise ValueError(
                "The state dict {} of automatic steps, but this optimizer {}. Construct it with "
                "the saved lr, momentum and damping ('auto', LevenbergMarquardt() or "
                "neither).".format(*relations)
            )
        mine = None if self.fallback is None else type(self.fallback.optimizer).__name__
        if ("fallback" in saved) != (mine is not None) and strict:
            raise different_fallback(saved.get("fallback"), mine)
        parts = {"state", "param_groups", "kfac", "update"}
        check_keys(saved, "the outermost dict", parts | ({"automatic", "fallback"} & saved.keys()))

    def _check_groups(self, saved: Any) -> None:
        count = len(saved) if isinstance(saved, list) else None
        if count != len(self.groups):
            raise ValueError(
                f"The state dict has {count} parameter groups, but this optimizer has "
                f"{len(self.groups)}. Construct it with the saved params=."
            )
        first = 0
        for index, (theirs, mine) in enumerate(zip(saved, self.groups, strict=True)):
            where = f"parameter group {index}"
            check_keys(theirs, where, {"params", *self.settings}, others=True)  # of schedulers
            members = list(range(first, first + len(mine["params"])))
            first += len(members)
            if theirs["params"] != members:
                raise ValueError(
                    f"The state dict has other parameters in {where} than this optimizer, which "
                    f"has {len(members)} there. Construct it with the saved model and params=."
                )
            for key in ("initial_lr", *self.settings):
                if key in theirs:
                    self._check_setting(key, theirs[key], where)
            if theirs["nesterov"] and theirs["momentum"] == 0:
                raise ValueError(f"The state dict has nesterov without momentum in {where}.")

    def _check_setting(self, key: str, value: Any, where: str) -> None:
        constraint = self.settings["lr" if key == "initial_lr" else key]
        check_value(value, f"{key} of {where}", constraint)
        if isinstance(value, str) and self.automatic is None:
            raise ValueError(
                f"The state dict has {key}={value!r} in {where}, but this optimizer takes no "
                f"automatic steps. Construct it with {key}={value!r}."
            )

    def _check_state(self, state: Any, update: Any) -> None:
        check_keys(update, "update", ("kl_clip_scale", "shapes", "held"))
        check_value(update["kl_clip_scale"], "kl_clip_scale in update", NUMBER)
        self._check_shapes(update["shapes"])
        check_contents("state", state, update["held"], self._called)
        for number, entries in state.items():
            where = self._called(number)
            check_value(entries, where, MAPPING)
            expected = self._state_kinds(self._parameters[number]) if self._has(number) else {}
            if extra := entries.keys() - expected.keys():
                raise ValueError(
                    f"The state dict has {', '.join(sorted(map(str, extra)))} for {where}, which "
                    "this optimizer does not have. Construct it with the saved settings (graft=, "
                    "fallback=, automatic or not)."
                )
            for key, value in entries.items():
                check_tensor(value, f"{key} of {where}", *expected[key])

    def _check_shapes(self, saved: Any) -> None:
        if not isinstance(saved, list) or len(saved) != len(self._shapes):
            raise ValueError(
                "The state dict does not tell the shapes of all parameters. It is damaged."
            )
        for number, (theirs, mine) in enumerate(zip(saved, self._shapes, strict=True)):
            if theirs != mine:
                raise ValueError(
                    f"The state dict has the shape {theirs} for {self._called(number)}, which is "
                    f"{mine} here. Construct the optimizer with the saved model and params=."
                )

    # --- parameters ----------------------------------------------------------------------------

    def _state_kinds(self, parameter: nn.Parameter) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of what may be in a parameter's state, by key."""
        own = "momentum_buffer" if self.automatic is None else "last_step"
        kinds = {} if self.graft is None else self.graft.state_kinds(parameter)
        return kinds | {own: (parameter.shape, parameter.dtype)}

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]

    @property
    def _shapes(self) -> list[list[int]]:
        return [list(parameter.shape) for parameter in self._parameters]

    def _has(self, number: Any) -> bool:
        return type(number) is int and number in range(len(self._parameters))

    def _called(self, number: Any) -> str:
        """How messages call the parameter of a number."""
        if not self._has(number):
            return f"a parameter {number!r} that this optimizer does not have"
        name = self._names.get(self._parameters[number], f"number {number}")  # of another module
        return f"the parameter {name!r}"

    @cached_property
    def _names(self) -> dict[nn.Parameter, str]:
        clean = clean_names(self.engine.model)
        return {
            parameter: joined(clean[module_name], name)
            for module_name, module in self.engine.model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
