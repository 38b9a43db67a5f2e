"""How parameters that K-FAC does not take are trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfac.arguments import argument_error

FallbackName = Literal["sgd", "adamw"]
OptimizerFactory = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]


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
        self._base = [
            (float(groups[source]["lr"]), float(inner["lr"]))
            for source, inner in zip(self._sources, self.optimizer.param_groups, strict=True)
        ]

    def _check(self, fallback: object, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        constraint = "a function that makes a torch.optim.Optimizer of the groups that it is given"
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise argument_error("KFAC", "fallback", constraint, fallback)
        taken = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        if taken != [[id(p) for p in members] for members in parameters]:
            raise argument_error(
                "KFAC", "fallback", constraint, fallback,
                "Its optimizer has other parameters or groups; pass the argument on as it is.",
            )  # fmt: skip

    def step(
        self, gradients: Mapping[nn.Parameter, Tensor], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Update the parameters.

        Args:
            gradients: Used in place of the parameters' ``.grad``.
            groups: K-FAC's parameter groups, whose learning rates set the schedule.
        """
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
        with _gradients_replaced(members, used):
            self.optimizer.step()

    def adopt(self, other: "Fallback") -> None:
        """Take over settings and state from a fallback for an earlier set of parameters."""
        members = {p for group in self.optimizer.param_groups for p in group["params"]}
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

    def state_dict(self) -> dict[str, Any]:
        """State of the inner optimizer, its type and the learning rates that schedules refer to."""
        return {
            "type": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "base": [list(base) for base in self._base],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, once :func:`check_fallback` has passed."""
        self.optimizer.load_state_dict(saved["optimizer"])
        self._base = [(outer, inner) for outer, inner in saved["base"]]


def check_fallback(fallback: Fallback | None, saved: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` unless a saved fallback fits this one; changes nothing."""
    mine = None if fallback is None else _outline(fallback.state_dict())
    theirs = None if saved is None else _outline(saved)
    if mine != theirs:
        raise ValueError(
            f"The state dict and this optimizer differ in fallback=: the state is of {theirs}, "
            f"but this optimizer has {mine}. Construct it with the saved setting."
        )


def _outline(saved: Mapping[str, Any]) -> str:
    sizes = [len(group["params"]) for group in saved.get("optimizer", {}).get("param_groups", [])]
    return f"{saved.get('type')} with {sizes} parameters"


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
