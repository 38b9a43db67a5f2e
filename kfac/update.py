"""The update itself, as functions of plain tensors: trust region, momentum, weight decay."""

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element of every tensor is finite: a boolean scalar, left on the device."""
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.ones((), dtype=torch.bool)
    device = filled[0].device
    return torch.stack([e.to(device, torch.float32) for e in _largest(filled)]).isfinite().all()


def _largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """max|t| of each tensor, none of them empty."""
    if tensors[0].device.type == "cpu":  # where this norm is not vectorised
        return [torch.maximum(high, -low) for low, high in map(torch.aminmax, tensors)]
    return list(torch._foreach_norm(list(tensors), float("inf")))


def predicted_change(
    directions: Sequence[Tensor], gradients: Sequence[Tensor], lrs: Sequence[float | Tensor]
) -> Tensor:
    """Σ lr²⟨Δ, g⟩ = lr²·Δᵀ(F + λI)Δ, about twice the Kullback-Leibler divergence of a step −lr·Δ.

    Args:
        directions: Preconditioned gradients Δ.
        gradients: Gradients g of the mean loss, of the same shapes.
        lrs: Learning rate of each.

    Returns:
        A scalar tensor; not finite if an element of any Δ or g is not.
    """
    device = directions[0].device
    terms = []
    for direction, gradient, lr in zip(directions, gradients, lrs, strict=True):
        precise = torch.promote_types(direction.dtype, torch.float32)
        inner = torch.dot(direction.to(precise).flatten(), gradient.to(precise).flatten())
        terms.append((lr * lr * inner).reshape(()).to(device))
    return torch.stack(terms).sum()


def kl_clip_scale(change: Tensor, kl_clip: float) -> Tensor:
    """min(1, √(κ / |Σ lr²⟨Δ, g⟩|)): keep the predicted change of the model's distribution below κ.

    Args:
        change: Of :func:`predicted_change`.
        kl_clip: κ.

    Returns:
        A scalar tensor in [0, 1].

    Source:
        Ba, Grosse & Martens 2017, "Distributed second-order optimization using Kronecker-factored
        approximations", section 5; the sum is over all layers, as there.
    """
    return (kl_clip / change.abs()).sqrt().nan_to_num(nan=1.0).clamp(max=1.0)


def stays_finite(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor = 1.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Tensor:
    """Whether :func:`descend` leaves only finite numbers: a boolean scalar, left on the device.

    Of a parameter that holds an infinity already, only Δ and m are asked.
    From bounds by the largest elements of each tensor, max|m| ← momentum·max|m| + max|Δ| and
    max|p| ← |1 − lr·weight_decay|·max|p| + lr·max|m|, of which 0.9 of the dtype's range is allowed,
    for rounding. Changes nothing.

    Args:
        parameters: Tensors of one dtype and device.
        directions: Δ of each.
        buffers: m of each, or None without momentum.
        lr: Learning rate.
        momentum: Momentum factor.
        nesterov: Whether to look ahead along the new buffer.
        weight_decay: Decoupled weight decay, per unit of learning rate.

    Cost:
        Reads every tensor once.
    """

    p, move = _bounds(parameters), _bounds(directions)
    if buffers is not None:
        direction, move = move, move + momentum * _bounds(buffers)
        if nesterov:
            move = torch.maximum(move, direction + momentum * move)
    rate = _rate(lr, p)
    moved = (1 - rate * weight_decay).abs() * p + rate * move
    limit = 0.9 * torch.finfo(parameters[0].dtype).max
    # What is not a number is not less. The rate itself is held in that dtype, too.
    stays = (moved < limit) | p.isinf()  # a mask of -inf, say, which stays what it is
    return ((move < limit) & stays).all() & (rate * max(1.0, weight_decay) < limit)


def _rate(lr: float | Tensor, like: Tensor) -> Tensor:
    """The learning rate as a scalar of this dtype and device; of a number, nothing is copied."""
    if isinstance(lr, Tensor):
        return lr.to(like).reshape(())
    return like.new_full((), lr)


def _bounds(tensors: Sequence[Tensor]) -> Tensor:
    """max|t| of each tensor ``[tensors]``, in float32 or better."""
    largest = torch.stack(_largest([t if t.numel() else t.new_zeros(1) for t in tensors]))
    return largest.to(torch.promote_types(largest.dtype, torch.float32))


def descend(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor] | None,
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
    accept: Tensor,
) -> None:
    """Move the parameters along −lr·Δ with momentum and decoupled weight decay, in place.

        p ← (1 − lr·weight_decay)·p,   m ← momentum·m + Δ,   p ← p − lr·m

    where Nesterov's momentum takes Δ + momentum·m in place of the last m.

    Args:
        parameters: Tensors to update.
        directions: Δ of each; they serve as work space and are overwritten. Zero if not accepted.
        buffers: m of each, or None without momentum; zero before the first step.
        lr: Learning rate.
        momentum: Momentum factor.
        nesterov: Whether to look ahead along the new buffer.
        weight_decay: Decoupled weight decay, per unit of learning rate.
        maximize: Ascend instead.
        accept: Boolean scalar; False leaves parameters and buffers as they are, without a
            host-device synchronisation. See :func:`stays_finite`.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"; momentum as in
        :class:`torch.optim.SGD`.
    """
    parameters, directions = list(parameters), list(directions)
    first = parameters[0]
    share = accept.to(first)
    rate = _rate(lr, first)
    rate = torch.where(share > 0, rate, torch.zeros_like(rate))  # zero times infinity is not zero
    if maximize:
        torch._foreach_neg_(directions)
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
    if buffers is not None:
        buffers = list(buffers)
        torch._foreach_mul_(buffers, torch.where(share > 0, torch.full_like(share, momentum), 1.0))
        _add(buffers, directions, share)
        if nesterov:
            torch._foreach_add_(directions, buffers, alpha=momentum)
    _add(parameters, directions if buffers is None or nesterov else buffers, -rate)


def _add(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Tensor) -> None:
    """Add a multiple of other tensors, in place, for a factor that is on the device."""
    if factor.device.type == "cpu":  # where large results in fresh memory take long
        for tensor, other in zip(tensors, others, strict=True):
            tensor.addcmul_(other, factor)
    else:
        torch._foreach_add_(tensors, torch._foreach_mul(others, factor))  # type: ignore[call-overload]
