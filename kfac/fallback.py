"""How parameters that K-FAC does not take are trained."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfac.arguments import NON_NEGATIVE, Constraint, argument_error
from kfac.checkpoint import check_contents, check_keys, check_value, contents
from kfac.update import all_finite

FallbackName = Literal["sgd", "adamw"]
OptimizerFactory = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]

_KEYS = ("type", "optimizer", "base", "parameters", "held", "settings")


class Fallback:
    """Another optimizer for the parameters that K-FAC does not take.

    Its groups mirror those of K-FAC. Its learning rates stay its own, but follow the schedule of
    K-FAC's: where a scheduler halves a group's ``lr``, the fallback's is halved too. ``"adamw"``
    takes over the groups' ``weight_decay``; a function decides on its own.

    Args:
        fallback: ``"adamw"`` or a function from parameter groups to an optimizer.
        groups: K-FAC's parameter groups.
        parameters: Of each group, the parameters that K-FAC does not take.

    Raises:
        ValueError: If the function returns something else, or an optimizer of other parameters.
    """

    def __init__(
        self,
        fallback: Literal["adamw"] | OptimizerFactory,
        groups: Sequence[dict[str, Any]],
        parameters: Sequence[Sequence[nn.Parameter]],
    ) -> None:
        # By position: loading a state dict replaces the groups themselves.
        self._sources = [index for index, members in enumerate(parameters) if members]
        own = [list(parameters[index]) for index in self._sources]
        make = torch.optim.AdamW if fallback == "adamw" else fallback
        self.optimizer = make([{"params": list(members)} for members in own])
        self._takes_weight_decay = fallback == "adamw"
        self._check(fallback, own)
        self._places = self._where_parameters_are()
        self._base = [
            (float(groups[source]["lr"]), float(inner["lr"]))
            for source, inner in zip(self._sources, self.optimizer.param_groups, strict=True)
        ]

    def _check(self, fallback: object, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        constraint = "a function that makes a torch.optim.Optimizer of the groups that it is given"
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise argument_error(
                "KFAC", "fallback", constraint, fallback,
                f"It returned a {type(self.optimizer).__name__}; return the optimizer.",
            )  # fmt: skip
        taken = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        if taken != [[id(p) for p in members] for members in parameters]:
            raise argument_error(
                "KFAC", "fallback", constraint, fallback,
                "Its optimizer has other parameters or groups; pass the argument on as it is.",
            )  # fmt: skip

    def step(
        self, gradients: Mapping[nn.Parameter, Tensor], groups: Sequence[dict[str, Any]]
    ) -> bool:
        """Update the parameters.

        Args:
            gradients: Used in place of the parameters' ``.grad``.
            groups: K-FAC's parameter groups, whose learning rates set the schedule.

        Returns:
            Whether they and their state are finite; if not, they are as they were.

        Cost:
            Copies of parameters and state, and a wait for the device.
        """
        self._follow()
        used: dict[nn.Parameter, Tensor] = {}
        followers = zip(self._sources, self.optimizer.param_groups, self._base, strict=True)
        for source, inner, (base, inner_base) in followers:
            group = groups[source]
            lr, full = float(group["lr"]), float(group.get("initial_lr", base))
            inner["lr"] = inner_base * (lr / full if full else float(lr > 0))
            if self._takes_weight_decay:
                inner["weight_decay"] = group["weight_decay"]
            for parameter in inner["params"]:
                if parameter in gradients:
                    gradient = gradients[parameter]
                    used[parameter] = -gradient if group["maximize"] else gradient
        members = [p for group in self.optimizer.param_groups for p in group["params"]]
        values = [p.detach().clone() for p in members]
        states = {p: _copied(state) for p, state in self.optimizer.state.items()}
        if not all_finite(list(used.values())):
            return False
        with _gradients_replaced(members, used):
            self.optimizer.step()
        if all_finite([*members, *self._state_tensors()]) or not self._has_lost(values):
            return True
        for parameter, value in zip(members, values, strict=True):
            parameter.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(states)
        return False

    def _has_lost(self, values: Sequence[Tensor]) -> bool:
        """Whether something is not finite, other than parameters that were not before."""
        members = [p for group in self.optimizer.param_groups for p in group["params"]]
        pairs = zip(members, values, strict=True)
        lost = [(value.isfinite() & ~p.isfinite()).any() for p, value in pairs]
        return not all_finite(list(self._state_tensors())) or bool(torch.stack(lost).any())

    def _state_tensors(self) -> Iterator[Tensor]:
        """What the optimizer keeps of parameters, where they are; its counts may be elsewhere."""
        for parameter, state in self.optimizer.state.items():
            for value in state.values():
                is_number = isinstance(value, Tensor) and value.is_floating_point()
                if is_number and value.dim() and value.device == parameter.device:
                    yield value

    def _where_parameters_are(self) -> list[tuple[torch.device, torch.dtype]]:
        groups = self.optimizer.param_groups
        return [(p.device, p.dtype) for group in groups for p in group["params"]]

    def _follow(self) -> None:
        """Bring the state to the parameters, if the model was moved or converted.

        Loading it does: torch then puts every optimizer's state where the parameters are.
        """
        places = self._where_parameters_are()
        if places != self._places:
            self.optimizer.load_state_dict(self.optimizer.state_dict())
            self._places = places

    def adopt(self, other: "Fallback") -> None:
        """Take over settings and state from a fallback for an earlier set of parameters."""
        members = {p for group in self.optimizer.param_groups for p in group["params"]}
        if other._places != other._where_parameters_are():
            self._places = []  # the state has yet to follow
        for parameter, state in other.optimizer.state.items():
            if parameter in members:
                self.optimizer.state[parameter] = state
        for i, source in enumerate(self._sources):
            if source in other._sources:
                j = other._sources.index(source)
                settings = dict(other.optimizer.param_groups[j])
                del settings["params"]
                self.optimizer.param_groups[i].update(settings)
                self._base[i] = other._base[j]

    def state_dict(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """State of the inner optimizer, and what it is of.

        Args:
            groups: K-FAC's parameter groups.

        Returns:
            The optimizer's "type" and state, "base": the learning rates that schedules refer to,
            "parameters": for each of its groups the parameters' numbers in K-FAC's state, and
            what there was: "held" and "settings", see :func:`kfac.checkpoint.contents`.
        """
        inner = self.optimizer.state_dict()
        return {
            "type": type(self.optimizer).__name__,
            "optimizer": inner,
            "base": [list(base) for base in self._base],
            "parameters": self._numbers(groups),
            "held": contents(inner["state"]),
            "settings": contents(_settings(inner["param_groups"])),
        }

    def _numbers(self, groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Of each group of the inner optimizer, the numbers that its parameters have in K-FAC's."""
        members = (parameter for group in groups for parameter in group["params"])
        numbers = {parameter: number for number, parameter in enumerate(members)}
        return [[numbers[p] for p in group["params"]] for group in self.optimizer.param_groups]

    def upgraded(self, saved: Any, groups: Sequence[Mapping[str, Any]]) -> Any:
        """State of version 1 of the format with the entries that version 2 has added.

        It did not say which parameters it was of, so they are taken to be those of this one if
        there are as many.
        """
        inner = saved.get("optimizer") if isinstance(saved, Mapping) else None
        numbers = self._numbers(groups)
        if not isinstance(inner, Mapping) or _listed_members(inner) != _consecutive(numbers):
            return saved
        return {
            "parameters": numbers,
            "held": contents(inner.get("state")),
            "settings": contents(_settings(inner["param_groups"])),
        } | dict(saved)

    def check_loadable(
        self,
        saved: Any,
        groups: Sequence[Mapping[str, Any]],
        named: Callable[[int], str],
        *,
        strict: bool,
    ) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` would succeed; changes nothing.

        Args:
            saved: What :meth:`state_dict` returned.
            groups: K-FAC's parameter groups.
            named: How messages call the parameter of a number.
            strict: Whether it must be of the parameters of this one, no more and no fewer.
        """
        mine = type(self.optimizer).__name__
        if not isinstance(saved, Mapping) or saved.get("type") != mine:
            raise different_fallback(saved, mine)
        check_keys(saved, "fallback", _KEYS)
        inner = check_keys(saved["optimizer"], "fallback.optimizer", ("state", "param_groups"))
        numbers = saved["parameters"]
        count = sum(len(group["params"]) for group in groups)
        known = [n for members in numbers for n in members] if _is_list_of_lists(numbers) else None
        if known is None or not set(known) <= set(range(count)) or len({*known}) < len(known):
            raise ValueError(
                "The state dict does not say which parameters its fallback is of, or they are not "
                "those of this optimizer. Construct it with the saved model, params= and skip=."
            )
        if strict and numbers != self._numbers(groups):
            other = {*known} ^ {n for members in self._numbers(groups) for n in members}
            raise ValueError(
                f"The state dict and this optimizer differ in the parameters of fallback=: "
                f"{', '.join(named(n) for n in sorted(other)) or 'their groups'}. Construct it "
                "with the saved model, params= and skip=, or load with strict=False, which takes "
                "the state of the parameters that both have."
            )
        if _listed_members(inner) != _consecutive(numbers):
            raise ValueError(
                "The state dict's fallback has other parameter groups than it had when it was "
                "saved. It is damaged."
            )
        check_value(saved["base"], "base of the fallback", _base_of(len(numbers)))
        check_contents(
            "settings of the fallback",
            _settings(inner["param_groups"]),
            saved["settings"],
            lambda group: f"group {group} of the fallback",
        )
        names = [named(number) for number in known]
        check_contents(
            "state of the fallback",
            inner["state"],
            saved["held"],
            lambda i: f"the fallback of {names[i] if i in range(len(names)) else i}",
        )

    def load_state_dict(
        self, saved: Mapping[str, Any] | None, groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Restore what :meth:`state_dict` returned, once :meth:`check_loadable` has passed.

        Parameters that it lacks start anew.

        Args:
            saved: The state; None to start all of them anew.
            groups: K-FAC's parameter groups.
        """
        if saved is None:
            self.optimizer.state.clear()
            return
        inner = copy.deepcopy(saved["optimizer"])  # Torch would share its tensors.
        theirs = [n for members in saved["parameters"] for n in members]
        entries = {theirs[i]: e for i, e in inner["state"].items() if i in range(len(theirs))}
        group_of = {n: i for i, members in enumerate(saved["parameters"]) for n in members}
        # An optimizer may also keep state of no parameter.
        state = {k: e for k, e in inner["state"].items() if k not in range(len(theirs))}
        mine, base = self.optimizer.state_dict()["param_groups"], list(self._base)
        for index, (numbers, group) in enumerate(zip(self._numbers(groups), mine, strict=True)):
            source = next((group_of[n] for n in numbers if n in group_of), None)
            if source is not None:
                group |= _without_params(inner["param_groups"][source])
                outer_lr, inner_lr = saved["base"][source]
                base[index] = (outer_lr, inner_lr)
            pairs = zip(group["params"], numbers, strict=True)
            state |= {i: entries[number] for i, number in pairs if number in entries}
        self.optimizer.load_state_dict({"state": state, "param_groups": mine})
        self._base = base


def different_fallback(saved: Any, mine: str | None) -> ValueError:
    """The error for a state that was saved with another fallback."""
    theirs = saved.get("type") if isinstance(saved, Mapping) else saved
    return ValueError(
        f"The state dict and this optimizer differ in fallback=: the state is of {theirs}, "
        f"but this optimizer has {mine}. Construct it with the saved setting."
    )


def _settings(groups: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    return {i: _without_params(group) for i, group in enumerate(groups)}


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _listed_members(inner: Mapping[str, Any]) -> list[Any] | None:
    groups = inner.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return None
    return [group.get("params") for group in groups]


def _consecutive(numbers: Sequence[Sequence[int]]) -> list[list[int]]:
    """Torch's numbers of the parameters of an optimizer with as many of them in each group."""
    ends = list(accumulate(len(members) for members in numbers))
    return [list(range(e - len(m), e)) for e, m in zip(ends, numbers, strict=True)]


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(members, list) and all(type(number) is int for number in members)
        for members in value
    )


def _base_of(groups: int) -> Constraint:
    return Constraint(
        "two finite numbers >= 0 for each group",
        lambda v: (
            isinstance(v, list)
            and len(v) == groups
            and all(
                isinstance(b, list) and len(b) == 2 and all(map(NON_NEGATIVE.accepts, b)) for b in v
            )
        ),
    )


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


@contextmanager
def _gradients_replaced(
    parameters: Sequence[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]
) -> Iterator[None]:
    originals = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = gradients.get(parameter)
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.grad = original
