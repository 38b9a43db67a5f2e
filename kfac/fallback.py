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
    K-FAC's: where a scheduler halves a group's ``lr``, the fallback's is halved too.

    Args:
        fallback: ``"adamw"`` or a function from parameter groups to an optimizer.
        groups: K-FAC's parameter groups.
        parameters: Of each group, the parameters that K-FAC does not take.
    """

    def __init__(
        self,
        fallback: Literal["adamw"] | OptimizerFactory,
        groups: Sequence[dict[str, Any]],
        parameters: Sequence[Sequence[nn.Parameter]],
    ) -> None:
        # By position: loading a state dict replaces the groups themselves.
        self._sources = [index for index, members in enumerate(parameters) if members]
        inner_groups = [
            {"params": list(members), "weight_decay": group["weight_decay"]}
            for group, members in zip(groups, parameters, strict=True)
            if members
        ]
        make = torch.optim.AdamW if fallback == "adamw" else fallback
        self.optimizer = make(inner_groups)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise argument_error(
                "KFAC", "fallback", "a function that returns a torch.optim.Optimizer", fallback
            )
        self._base = [
            (float(groups[source]["lr"]), float(inner["lr"]))
            for source, inner in zip(self._sources, self.optimizer.param_groups, strict=True)
        ]

    def step(
        self, gradients: Mapping[nn.Parameter, Tensor], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Update the parameters.

        Args:
            gradients: Used in place of the parameters' ``.grad``.
            groups: K-FAC's parameter groups, whose learning rates set the schedule.
        """
        followers = zip(self._sources, self.optimizer.param_groups, self._base, strict=True)
        for source, inner, (base, inner_base) in followers:
            lr = float(groups[source]["lr"])
            inner["lr"] = inner_base * (lr / base if base else float(lr > 0))
        members = [p for group in self.optimizer.param_groups for p in group["params"]]
        with _gradients_replaced(members, gradients):
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State of the inner optimizer and the learning rates that the schedule is relative to."""
        return {"optimizer": self.optimizer.state_dict(), "base": [list(b) for b in self._base]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(saved["optimizer"])
        self._base = [(outer, inner) for outer, inner in saved["base"]]


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
