"""Averages of the parameters over the steps, for torch's ``AveragedModel``."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kfac.arguments import UNIT_INTERVAL, check

# Of averaged and current tensors and the number of models that were averaged before.
Average = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]


def parameter_average(decay: float = 0.99) -> Average:
    """The average that K-FAC's authors evaluate in place of the last parameters.

        θ̄_k = ξ_k θ̄_{k−1} + (1 − ξ_k) θ_k,   ξ_k = min(1 − 1/k, ξ)

    where k counts the calls of ``update_parameters``: the mean of all parameters so far, until
    there are 1/(1 − ξ) of them, and from then on an exponential average. The initial parameters
    have no weight in it.

        averaged = AveragedModel(model, multi_avg_fn=parameter_average())
        ...
        optimizer.step()
        averaged.update_parameters(model)

    Args:
        decay: ξ in [0, 1); 0 for no averaging.

    Returns:
        A function for ``multi_avg_fn`` of :class:`torch.optim.swa_utils.AveragedModel`; it can be
        pickled. Of integers, which only ``use_buffers=True`` hands to it, it takes the latest.

    Raises:
        ValueError: If ``decay`` violates its constraint.

    Source:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", experiments, with ξ = 0.99.
    """
    check("parameter_average", "decay", decay, UNIT_INTERVAL, "The default is 0.99.")
    return partial(_average, decay=decay)


def latest_share(count: int, decay: float) -> float:
    """1 − ξ_k = max(1/k, 1 − ξ): what the latest of k models has in their average."""
    return max(1 / count, 1 - decay)


@torch.no_grad()
def _average(
    averaged: Sequence[Tensor],
    current: Sequence[Tensor],
    num_averaged: Tensor | int,
    *,
    decay: float,
) -> None:
    """Take the current tensors into the averages, in place."""
    share = latest_share(int(num_averaged) + 1, decay)
    for mine, latest in zip(averaged, current, strict=True):
        if mine.is_floating_point() or mine.is_complex():
            mine.lerp_(latest, share)
        else:  # a rounded average of counts or indices is none of them
            mine.copy_(latest)
