"""Grafting: a layer's step has K-FAC's direction and the length that another optimizer gives it."""

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfac.arguments import one_of
from kfac.directions import Directions
from kfac.update import all_finite

GraftName = Literal["sgd", "adam"]
GRAFT = one_of([None, "sgd", "adam"])

# Adam's β₂ and ε, as in torch.optim.Adam.
DECAY, EPSILON = 0.999, 1e-8
AVERAGE, WEIGHT = "graft_average", "graft_weight"
State = MutableMapping[Any, Any]


class Graft:
    """Gives every layer's preconditioned gradient the norm of another optimizer's update.

        Δ ← Δ ‖u‖/‖Δ‖,   u = g  ("sgd"),   u = g/(√v + ε)  ("adam")

    for every layer, weight and bias together; v is the average of g² over the steps so far with the
    weights β₂ᵏ, Adam's bias-corrected second moment. A layer without a direction takes no step.

    Args:
        name: The other optimizer.

    Source:
        Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates";
        Anil et al. 2020, "Scalable Second Order Optimization for Deep Learning". u has no momentum
        of its own, since K-FAC's comes after it. See docs/method.md.
    """

    def __init__(self, name: GraftName) -> None:
        self.name = name
        self._next: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    def apply(
        self, directions: Directions, gradients: Mapping[nn.Parameter, Tensor], state: State
    ) -> Tensor:
        """Rescale the directions, in place; the state is not changed before :meth:`commit`.

        Args:
            directions: Preconditioned gradients.
            gradients: Gradients of the mean loss.
            state: The optimizer's state by parameter.

        Returns:
            Whether directions, gradients and lengths are finite, a boolean scalar.
        """
        updates = None
        self._next.clear()
        if self.name == "adam":
            members = [p for p in gradients if p in directions.parameters]
            updates = self._adam(members, [gradients[p] for p in members], state)
        numbers = []
        for layers, gradient, direction in directions.stacks:
            update = gradient
            if updates is not None:
                update = torch.stack([layer.gradient_matrix(updates) for layer in layers])
            own = norms(direction)
            scale = length_ratio(norms(update).to(own), own)
            direction.mul_(scale.view(-1, 1, 1, 1))
            numbers += [own, norms(gradient), scale]
        return all_finite(numbers)

    def _adam(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], state: State
    ) -> dict[nn.Parameter, Tensor]:
        """Adam's update of each parameter, without its first moment."""
        if not parameters:
            return {}
        gradients = [g.to(_dtype(g)) for g in gradients]
        states = [_state_of(p, state) for p in parameters]
        weights = torch._foreach_mul([s[WEIGHT] for s in states], DECAY)
        torch._foreach_add_(weights, 1.0)
        squares = torch._foreach_mul(gradients, gradients)
        averages = [
            torch.lerp(s[AVERAGE], square, weight.reciprocal())
            for s, square, weight in zip(states, squares, weights, strict=True)
        ]
        self._next = dict(zip(parameters, zip(averages, weights, strict=True), strict=True))
        roots = torch._foreach_sqrt(averages)
        torch._foreach_add_(roots, EPSILON)
        return dict(zip(parameters, torch._foreach_div(gradients, roots), strict=True))

    def commit(self, state: State, accept: Tensor) -> None:
        """Take the last step's gradients into the averages.

        Args:
            state: The optimizer's state by parameter.
            accept: Boolean scalar; False leaves it as it is.
        """
        for parameter, (average, weight) in self._next.items():
            mine, accepted = state[parameter], accept.to(parameter.device)
            for key, value in ((AVERAGE, average), (WEIGHT, weight)):
                mine[key].copy_(torch.where(accepted, value, mine[key]))
        self._next.clear()

    def load(
        self, groups: Sequence[Mapping[str, Any]], state: State, saved: Mapping[str, Any]
    ) -> None:
        """Take the averages out of a state dict as they are.

        Torch has cast them to the parameters' dtype, in which they would stand still where it is
        narrow.

        Args:
            groups: The optimizer's parameter groups.
            state: Its state by parameter.
            saved: The state dict that it has loaded.
        """
        for group, theirs in zip(groups, saved["param_groups"], strict=True):
            for parameter, index in zip(group["params"], theirs["params"], strict=True):
                found = saved["state"].get(index, {})
                for key in {AVERAGE, WEIGHT} & found.keys():
                    state[parameter][key] = found[key].to(
                        parameter.device, _dtype(parameter), copy=True
                    )

    def state_kinds(self, parameter: nn.Parameter) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of what it may keep in a parameter's state, by key."""
        if self.name != "adam":
            return {}
        dtype = _dtype(parameter)
        return {AVERAGE: (parameter.shape, dtype), WEIGHT: (torch.Size(), dtype)}

    def memory(self, parameters: Collection[nn.Parameter]) -> int:
        """Bytes of the state of some parameters."""
        if self.name != "adam":
            return 0
        return sum((p.numel() + 1) * _dtype(p).itemsize for p in parameters)


def norms(stack: Tensor) -> Tensor:
    """Norm of every layer in a stack ``[layers, groups, d_out, d_in]``, as ``[layers]``."""
    found: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return found


def length_ratio(wanted: Tensor, own: Tensor) -> Tensor:
    """What a vector is multiplied by to change its norm; 0 for a vector that is zero.

    Args:
        wanted: Norms that vectors should have, ``[layers]``.
        own: Norms that they have, ``[layers]``.

    Returns:
        Numbers ``[layers]``, not finite where a norm is not a number or ``wanted`` is infinite.
    """
    return torch.where(own == 0, torch.zeros_like(wanted), wanted / own)


def _dtype(tensor: Tensor) -> torch.dtype:
    """Type of the averages: squares of half-precision numbers do not fit into their type."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _state_of(parameter: nn.Parameter, state: State) -> dict[str, Tensor]:
    """A parameter's state, with averages that start from nothing."""
    mine: dict[str, Tensor] = state[parameter]
    if AVERAGE not in mine:
        mine[AVERAGE] = torch.zeros_like(parameter, dtype=_dtype(parameter))
        mine[WEIGHT] = torch.zeros((), dtype=_dtype(parameter), device=parameter.device)
    for key in (AVERAGE, WEIGHT):  # the model may have been moved or converted
        mine[key] = mine[key].to(parameter.device, _dtype(parameter))
    return mine
