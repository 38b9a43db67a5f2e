"""The update itself, as functions of plain tensors: trust region, momentum, weight decay."""

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element of every tensor is finite: a boolean scalar, left on the device."""
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.tensor(True)
    device = filled[0].device
    if device.type == "cpu":  # where the norm of many tensors is not vectorised
        extremes = [extreme for t in filled for extreme in torch.aminmax(t)]
    else:
        extremes = list(torch._foreach_norm(filled, float("inf")))
    return torch.stack([e.to(device, torch.float32) for e in extremes]).isfinite().all()


def kl_clip_scale(
    directions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lrs: Sequence[float | Tensor],
    kl_clip: float,
) -> Tensor:
    """min(1, √(κ / |Σ lr²⟨Δ, g⟩|)): keep the predicted change of the model's distribution below κ.

    lr²⟨Δ, g⟩ is lr²·Δᵀ(F + λI)Δ, about twice the Kullback-Leibler divergence of a step −lr·Δ.

    Args:
        directions: Preconditioned gradients Δ.
        gradients: Gradients g of the mean loss, of the same shapes.
        lrs: Learning rate of each.
        kl_clip: κ.

    Returns:
        A scalar tensor in [0, 1].

    Source:
        Ba, Grosse & Martens 2017, "Distributed second-order optimization using Kronecker-factored
        approximations", section 5; the sum is over all layers, as there.
    """
    device = directions[0].device
    terms = []
    for direction, gradient, lr in zip(directions, gradients, lrs, strict=True):
        precise = torch.promote_types(direction.dtype, torch.float32)
        inner = torch.dot(direction.to(precise).flatten(), gradient.to(precise).flatten())
        terms.append((lr * lr * inner).reshape(()).to(device))
    return (kl_clip / torch.stack(terms).sum().abs()).sqrt().nan_to_num(nan=1.0).clamp(max=1.0)


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
        directions: Δ of each; they serve as work space and are overwritten.
        buffers: m of each, or None without momentum; zero before the first step.
        lr: Learning rate.
        momentum: Momentum factor.
        nesterov: Whether to look ahead along the new buffer.
        weight_decay: Decoupled weight decay, per unit of learning rate.
        maximize: Ascend instead.
        accept: Boolean scalar; False leaves parameters and buffers as they are, without a
            host-device synchronisation.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"; momentum as in
        :class:`torch.optim.SGD`.
    """
    parameters, directions = list(parameters), list(directions)
    first = parameters[0]
    accept = accept.to(first.device)
    rate = torch.as_tensor(lr, dtype=first.dtype, device=first.device).reshape(())
    rate = torch.where(accept, rate, 0.0)
    for direction in directions:
        direction.masked_fill_(~accept, 0.0)
    if maximize:
        torch._foreach_neg_(directions)
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
    if buffers is not None:
        buffers = list(buffers)
        torch._foreach_mul_(buffers, torch.where(accept, torch.full_like(rate, momentum), 1.0))
        torch._foreach_add_(buffers, directions)
        if nesterov:
            torch._foreach_add_(directions, buffers, alpha=momentum)
        else:
            torch._foreach_copy_(directions, buffers)
    torch._foreach_mul_(directions, -rate)
    torch._foreach_add_(parameters, directions)
