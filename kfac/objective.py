"""The objective that automatic steps minimise: the loss and what the weight decay adds to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kfac.preconditioner import Preconditioner
from kfac.quadratic_model import inner_products
from kfac.update import stays_finite

ByParameter = Mapping[nn.Parameter, Tensor]


@dataclass
class Objective:
    """h(θ) = L(θ) + ½ Σ η θ² and its gradient at the parameters of now.

    Attributes:
        parameters: θ: those with a gradient.
        decays: η of each.
        loss_gradients: ∇L.
        gradients: ∇h.
        last: The last step, of the parameters that took one.
        terms: What a summed loss is divided by, 1 for a mean one.
    """

    parameters: list[nn.Parameter]
    decays: list[float]
    loss_gradients: dict[nn.Parameter, Tensor]
    gradients: dict[nn.Parameter, Tensor]
    last: dict[nn.Parameter, Tensor]
    terms: float
    _decay_of: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        engine: Preconditioner,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Mapping[str, Tensor]],
    ) -> "Objective":
        """The objective after a backward pass."""
        decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
        losses = engine.mean_gradients(1.0)
        gradients = {
            p: g.add(p.detach(), alpha=decays[p]) if decays[p] else g for p, g in losses.items()
        }
        terms = 1.0
        if engine.loss_reduction == "sum":
            terms = float(engine.mean_loss_terms())
        return cls(
            list(losses),
            [decays[p] for p in losses],
            losses,
            gradients,
            {p: state[p]["last_step"] for p in losses if "last_step" in state.get(p, {})},
            terms,
            {layer.name: decays.get(layer.weight.parameter, 0.0) for layer in engine.layers},
        )

    def preconditioner_damping(self, damping: float) -> dict[str, float]:
        """λ + η by layer name."""
        return {name: damping + decay for name, decay in self._decay_of.items()}

    def aligned(self, direction: ByParameter) -> list[Tensor]:
        """A direction as a tensor for every parameter."""
        return [direction[p] if p in direction else torch.zeros_like(p) for p in self.parameters]

    def decay_change(self, step: ByParameter) -> float:
        """½ Σ η ((θ)² − (θ − δ)²) at parameters θ that have taken the step δ."""
        steps = self.aligned(step)
        here = [p.detach() - d / 2 for p, d in zip(self.parameters, steps, strict=True)]
        return float(inner_products([here], [steps], self.decays))

    def stays_finite(self, step: ByParameter) -> bool:
        """Whether :meth:`move` leaves only finite parameters; waits for the device."""
        return all(stays_finite([p.detach()], [delta]) for p, delta in step.items())

    @torch.no_grad()
    def move(self, step: ByParameter) -> None:
        """θ ← θ + δ."""
        for parameter, delta in step.items():
            parameter.add_(delta)

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """θ ← the values, bit for bit."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
