"""Dense float64 references for the tests; they share no code with the package, import none of it.

A layer's parameters are laid out as `[groups, d_out, d_in]`: the weight as a matrix, the bias as
its last column, one block per group of a convolution. Flattening a block row by row gives the
parameter vector of its Fisher block, so that the Kronecker product of A and G is `kron(G, A)`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.modules.conv import _ConvNd

Criterion = Callable[[Tensor, Tensor], Tensor]


# Layout


def groups_of(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, _ConvNd) else 1


def to_blocks(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight and bias (or their gradients, or steps) as `[groups, d_out, d_in (+ 1)]`.

    Of a transposed convolution, outputs come first and kernels are flipped, as patches see them.
    """
    blocks = weight.unflatten(0, (groups_of(layer), -1))
    if isinstance(layer, _ConvNd) and layer.transposed:
        blocks = blocks.transpose(1, 2).flip(tuple(range(3, blocks.dim())))
    matrix = blocks.flatten(2)
    if bias is not None:
        matrix = torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], dim=2)
    return matrix


def layer_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]


def parameter_blocks(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values by parameter name, regrouped into one stack of blocks per layer."""
    return {
        name: to_blocks(
            model.get_submodule(name), values[f"{name}.weight"], values.get(f"{name}.bias")
        )
        for name in layer_names(model)
    }


# Gradient and generalised Gauss-Newton matrix of the actual loss


def gradients(
    model: nn.Module, inputs: Tensor, target: Tensor, criterion: Criterion
) -> dict[str, Tensor]:
    """Gradient of the loss by parameter name; `.grad` is not touched."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = criterion(model(inputs), target)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def loss_hessian(output: Tensor, target: Tensor, criterion: Criterion) -> Tensor:
    """`[M, M]` Hessian of the loss with respect to all M elements of the output."""
    hessian = torch.autograd.functional.hessian(lambda o: criterion(o, target), output.detach())
    return hessian.reshape(output.numel(), output.numel())


def ggn_blocks(
    model: nn.Module, name: str, inputs: Tensor, target: Tensor, criterion: Criterion
) -> Tensor:
    """`[groups, p, p]`: Jᵀ H J for the parameters of one layer, from explicit Jacobians."""
    layer = model.get_submodule(name)
    parameters = {f"{name}.{k}": p.detach() for k, p in layer.named_parameters()}
    jacobian = jacrev(lambda values: functional_call(model, values, (inputs,)))(parameters)
    output = model(inputs)
    # rows: output elements
    weights = jacobian[f"{name}.weight"].reshape(output.numel(), *layer.weight.shape)
    biases = [None] * output.numel()
    if layer.bias is not None:
        biases = jacobian[f"{name}.bias"].reshape(output.numel(), -1)
    pairs = zip(weights, biases, strict=True)
    blocks = torch.stack([to_blocks(layer, weight, bias) for weight, bias in pairs]).flatten(2)
    hessian = loss_hessian(output, target, criterion)
    return torch.einsum("mgp,mk,kgq->gpq", blocks, hessian, blocks)


def jacobian(model: nn.Module, *inputs: Tensor) -> Tensor:
    """`[M, P]`: of all M elements of the output by all parameters, one after another.

    The call draws random numbers and updates buffers as any other.
    """
    output = model(*inputs)
    parameters = list(model.parameters())
    rows = [
        torch.autograd.grad(
            element, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for element in output.flatten()
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# Inputs of a layer as rows


def padding_of(layer: _ConvNd, axis: int) -> tuple[int, int]:
    """Padding before and after; `"same"` puts the odd one after."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return layer.padding[axis], layer.padding[axis]


def source(position: int, size: int, mode: str) -> int | None:
    """The pixel that a position inside or outside of the image reads; None for a zero."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "circular":
        return position % size
    if mode == "replicate":
        return min(max(position, 0), size - 1)
    if mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    raise ValueError(mode)


def window(layer: _ConvNd, axis: int, size: int) -> list[list[int | None]]:
    """Per output location of one axis, the pixels under the kernel's offsets."""
    if layer.transposed:
        return transposed_window(layer, axis, size)
    before, after = padding_of(layer, axis)
    kernel, stride = layer.kernel_size[axis], layer.stride[axis]
    dilation = layer.dilation[axis]
    count = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    return [
        [
            source(start * stride + offset * dilation - before, size, layer.padding_mode)
            for offset in range(kernel)
        ]
        for start in range(count)
    ]


def transposed_window(layer: _ConvNd, axis: int, size: int) -> list[list[int | None]]:
    """Per output location of one axis, the pixels that the flipped kernel's offsets multiply.

    By definition, pixel i times kernel offset k is added at i·stride + k·dilation - padding.
    """
    stride, dilation = layer.stride[axis], layer.dilation[axis]
    kernel, padding = layer.kernel_size[axis], layer.padding[axis]
    count = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
    reached = {
        (i * stride + k * dilation - padding, k): i for i in range(size) for k in range(kernel)
    }
    return [
        [reached.get((location, k)) for k in reversed(range(kernel))]
        for location in range(count + layer.output_padding[axis])
    ]


def patches(layer: _ConvNd, x: Tensor) -> Tensor:
    """`[N, T, C·|kernel|]`: what the kernel sees at every output location, pixel by pixel."""
    axes = [window(layer, axis, size) for axis, size in enumerate(x.shape[2:])]
    zero = torch.zeros_like(x.flatten(2)[..., 0])
    locations = [
        torch.stack(
            [zero if None in pixel else x[:, :, *pixel] for pixel in product(*offsets)], dim=2
        ).flatten(1)
        for offsets in product(*axes)
    ]
    return torch.stack(locations, dim=1)


def input_rows(layer: nn.Module, value: Tensor, examples: int) -> Tensor:
    """`[N, T, groups, d_in (+ 1)]`: inputs per example and position, the bias' 1 appended."""
    if isinstance(layer, _ConvNd):
        rows = patches(layer, value)
    else:
        rows = value.reshape(examples, -1, value.shape[-1])
    rows = rows.unflatten(-1, (groups_of(layer), -1))
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    return rows


def output_rows(layer: nn.Module, value: Tensor, examples: int) -> Tensor:
    """`[N, T, groups, d_out]`: outputs (or what has their shape) per example and position."""
    rows = value.flatten(2).mT if isinstance(layer, _ConvNd) else value
    return rows.reshape(examples, -1, groups_of(layer), rows.shape[-1] // groups_of(layer))


# Factors, the convention of the documentation written out


@dataclass
class Layer:
    """All that a layer's factors depend on, for one batch."""

    inputs: Tensor  # [N, T, groups, d_in]
    jacobian: Tensor  # [M, N, T, groups, d_out]: output element by layer output
    gradient: Tensor  # [N, T, groups, d_out]: of the mean loss
    hessian: Tensor  # [M, M]: of the mean loss


def observe(
    model: nn.Module, name: str, inputs: Tensor, target: Tensor, criterion: Criterion
) -> Layer:
    """Run the model once, perturbing the layer's output by a zero to differentiate with."""
    layer, examples = model.get_submodule(name), inputs.shape[0]
    seen, zeros = [], []

    def perturb(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(arguments[0].detach())
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    handle = layer.register_forward_hook(perturb)
    output = model(inputs)
    handle.remove()

    def rows(values: Iterable[Tensor]) -> Tensor:
        return torch.cat([output_rows(layer, value, examples) for value in values], dim=1)

    basis = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
    by_call = torch.autograd.grad(
        output, zeros, basis, retain_graph=True, is_grads_batched=True, materialize_grads=True
    )
    jacobian = torch.stack([rows(element) for element in zip(*by_call, strict=True)])
    return Layer(
        inputs=torch.cat([input_rows(layer, value, examples) for value in seen], dim=1),
        jacobian=jacobian,
        gradient=rows(torch.autograd.grad(criterion(output, target), zeros)),
        hessian=loss_hessian(output, target, criterion),
    )


def input_factor(layer: Layer, sharing: str = "expand") -> Tensor:
    """A `[groups, d_in, d_in]`: second moment of the inputs, or of their mean over positions."""
    rows = layer.inputs.flatten(0, 1) if sharing == "expand" else layer.inputs.mean(dim=1)
    return torch.einsum("rgi,rgj->gij", rows, rows) / rows.shape[0]


def exact_output_factor(layer: Layer, sharing: str = "expand") -> Tensor:
    """G `[groups, d_out, d_out]`: Σ over examples and positions of J_tᵀ H J_t, or of their sum."""
    jacobian = layer.jacobian
    if sharing == "reduce":
        jacobian = jacobian.sum(dim=2, keepdim=True)
    return torch.einsum("mntgo,mk,kntgp->gop", jacobian, layer.hessian, jacobian)


def empirical_output_factor(layer: Layer, terms: float, sharing: str = "expand") -> Tensor:
    """G = (1/N) Σ b bᵀ with b = N · gradient of the mean loss, N the number of loss terms."""
    gradient = layer.gradient if sharing == "expand" else layer.gradient.sum(dim=1, keepdim=True)
    return torch.einsum("ntgo,ntgp->gop", terms * gradient, terms * gradient) / terms


def identity_output_factor(layer: Layer) -> Tensor:
    groups, width = layer.gradient.shape[-2:]
    return torch.eye(width, dtype=layer.gradient.dtype).repeat(groups, 1, 1)


# Preconditioning by dense solves; gradients and results are [groups, d_out, d_in]


def solve(fisher: Tensor, damping: float, gradient: Tensor) -> Tensor:
    """(F + λI)⁻¹ g, block by block."""
    damped = fisher + damping * torch.eye(fisher.shape[-1], dtype=fisher.dtype)
    return torch.linalg.solve(damped, gradient.flatten(1)).view_as(gradient)


def kron(left: Tensor, right: Tensor) -> Tensor:
    """`torch.kron`, which does not take every layout that an einsum may return."""
    return torch.kron(left.contiguous(), right.contiguous())


def kronecker(a: Tensor, g: Tensor) -> Tensor:
    return torch.stack([kron(right, left) for left, right in zip(a, g, strict=True)])


def solve_exact_damping(a: Tensor, g: Tensor, damping: float, gradient: Tensor) -> Tensor:
    """(A ⊗ G + λI)⁻¹ g."""
    return solve(kronecker(a, g), damping, gradient)


def solve_factored_damping(a: Tensor, g: Tensor, damping: float, gradient: Tensor) -> Tensor:
    """((A + π√λ I) ⊗ (G + √λ/π I))⁻¹ g, π² = (tr A / d_in) / (tr G / d_out) per block."""
    damped = []
    for left, right in zip(a, g, strict=True):
        mean_left, mean_right = left.diagonal().mean(), right.diagonal().mean()
        pi = (mean_left / mean_right).sqrt() if mean_left > 0 and mean_right > 0 else 1.0
        damped.append(
            kron(
                right + damping**0.5 / pi * torch.eye(len(right), dtype=right.dtype),
                left + pi * damping**0.5 * torch.eye(len(left), dtype=left.dtype),
            )
        )
    return solve(torch.stack(damped), 0.0, gradient)


# Update


def clip_scale(
    steps: Iterable[Tensor], gradients: Iterable[Tensor], lr: float, clip: float
) -> float:
    """min(1, √(κ / (lr² |Σ⟨Δ, g⟩|)))."""
    inner = sum((step * g).sum().item() for step, g in zip(steps, gradients, strict=True))
    return min(1.0, (clip / (lr**2 * abs(inner))) ** 0.5)


def grafted(direction: Tensor, update: Tensor) -> Tensor:
    """The direction with the length of another optimizer's update."""
    return direction / direction.norm() * update.norm()


def adam_update(gradients: Sequence[Tensor]) -> Tensor:
    """Adam's update after these gradients with β₁ = 0, by its definition."""
    moment = torch.zeros_like(gradients[0])
    for gradient in gradients:
        moment = 0.999 * moment + (1 - 0.999) * gradient**2
    corrected = moment / (1 - 0.999 ** len(gradients))
    return gradients[-1] / (corrected.sqrt() + 1e-8)


@dataclass
class Descent:
    """Torch's SGD with momentum; weight decay decoupled: outside of the momentum buffer."""

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    buffer: Tensor | None = None

    def __call__(self, parameter: Tensor, direction: Tensor) -> Tensor:
        if self.buffer is None:
            self.buffer = direction.clone()
        else:
            self.buffer = self.momentum * self.buffer + direction
        step = direction + self.momentum * self.buffer if self.nesterov else self.buffer
        return parameter - self.lr * (step + self.weight_decay * parameter)


def parameter_average(values: Sequence[Tensor], decay: float) -> Tensor:
    """θ̄ₖ = ξₖ θ̄ₖ₋₁ + (1 − ξₖ) θₖ with ξₖ = min(1 − 1/k, ξ), from k = 1."""
    average = torch.zeros_like(values[0])
    for k, value in enumerate(values, 1):
        xi = min(1 - 1 / k, decay)
        average = xi * average + (1 - xi) * value
    return average


def weighted_average(values: Sequence[Tensor], decay: float) -> Tensor:
    """Σ βᵏ⁻ⁱ vᵢ / Σ βᵏ⁻ⁱ, the latest value with weight one."""
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
