"""The networks that are trained; their weights are drawn from torch's global generator."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from peers.workloads import TOKENS, Layer
from training.data import BOUNDARY_WEIGHT

CURVES_SIZES = (784, 400, 200, 100, 50, 25, 6)
DIGITS_SIZES = (64, 256, 128, 64, 16)


def curves_autoencoder() -> nn.Sequential:
    """784-400-200-100-50-25-6 and back, sigmoid but for the code, started sparse: Martens 2010."""
    return sparse(autoencoder(CURVES_SIZES, nn.Sigmoid))


def digits_autoencoder() -> nn.Sequential:
    """64-256-128-64-16 and back, tanh but for the code."""
    return autoencoder(DIGITS_SIZES, nn.Tanh)


def autoencoder(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """`sizes` to the code and back, to logits; the code itself is linear."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise([*sizes, *reversed(sizes[:-1])]):
        layers.append(nn.Linear(d_in, d_out))
        if d_out != sizes[-1]:
            layers.append(activation())
    return nn.Sequential(*layers[:-1])


def sparse(model: nn.Sequential, incoming: int = 15) -> nn.Sequential:
    """Every unit starts with that many weights from N(0, 1), all others zero, and no bias."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            d_out, d_in = layer.weight.shape
            chosen = torch.rand(d_out, d_in).argsort(1)[:, :incoming]
            values = torch.randn(chosen.shape)
            with torch.no_grad():
                layer.weight.zero_().scatter_(1, chosen, values)
                layer.bias.zero_()
    return model


def small_vgg11(width: int = 16) -> nn.Sequential:
    """VGG-11 without normalisation, of a quarter of its width and capped at 8·`width` channels."""
    layers: list[nn.Module] = []
    channels_in = 3
    for stage in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        for channels in (factor * width for factor in stage):
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU(inplace=True)]
            channels_in = channels
        layers.append(nn.MaxPool2d(2))
    return he_initialised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels_in, 10)))


def wave_net(classes: int) -> nn.Sequential:
    """Five convolutions over time without normalisation, averaged at the end."""
    layers: list[nn.Module] = []
    for channels_in, channels in pairwise((1, 32, 64, 64, 64, 64)):
        stride = 2 if channels_in != channels else 1
        layers += [nn.Conv1d(channels_in, channels, 5, stride, padding=2), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, classes)]
    return he_initialised(nn.Sequential(*layers, *head))


def he_initialised(model: nn.Sequential) -> nn.Sequential:
    """Convolution weights from N(0, 2 / fan in), biases zero: He et al. 2015."""
    for layer in model:
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model


class ByteModel(nn.Module):
    """A pre-norm transformer that predicts the next byte of every position: ``[N·T, 256]``."""

    def __init__(self, layers: int = 2, width: int = 128, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(TOKENS, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS)
        self.register_buffer("places", torch.arange(length))
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.bytes(x) + self.positions(self.places)
        logits: Tensor = self.head(self.norm(self.layers(embedded)))
        return logits.flatten(0, 1)


class Poisson(nn.Module):
    """What a network u says about points: −Δu inside, a weighted u on the boundary, ``[N, 1]``.

    Every layer is called once with the value, both derivatives and the Laplacian of its inputs,
    ``[N, 4, d]``: a forward Laplacian instead of two backward passes by autograd. A linear layer
    maps all four alike, apart from its bias, which is the weight of one more input that is 1 for
    the value and 0 for the derivatives. So the loss of the differential equation is
    ``MSELoss()(model(points), targets)``, an ordinary loss of shared weights, and K-FAC with a
    criterion applies as it is: Dangel, Müller & Zeinhofer 2024, "Kronecker-Factored Approximate
    Curvature for Physics-Informed Neural Networks".
    """

    def __init__(self, sizes: Sequence[int] = (2, 64, 64, 64, 1)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(d_in + 1, d_out, bias=False) for d_in, d_out in pairwise(sizes)
        )

    def forward(self, points: Tensor) -> Tensor:
        jets = self.jets(points[:, :2])
        value, laplacian = jets[:, 0], jets[:, 3]
        return torch.where(points[:, 2:] > 0, -laplacian, BOUNDARY_WEIGHT * value)

    def jets(self, points: Tensor) -> Tensor:
        """u, ∂u/∂x, ∂u/∂y and Δu at points ``[N, 2]``: ``[N, 4, 1]``."""
        jets = points.new_zeros(len(points), 4, 2)
        jets[:, 0] = points
        jets[:, 1, 0] = jets[:, 2, 1] = 1
        *hidden, last = self.layers
        for layer in hidden:
            jets = tanh_of(layer(with_constant(jets)))
        result: Tensor = last(with_constant(jets))
        return result


def with_constant(jets: Tensor) -> Tensor:
    """One more column with the jet of the constant 1."""
    constant = jets.new_tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1)
    return torch.cat([jets, constant.expand(len(jets), 4, 1)], 2)


def tanh_of(jets: Tensor) -> Tensor:
    """The chain rule: tanh h, tanh′ ∂h, tanh′ Δh + tanh″ |∂h|²."""
    value, gradient, laplacian = torch.split(jets, [1, 2, 1], 1)
    tanh = value.tanh()
    first = 1 - tanh**2
    second = -2 * tanh * first
    curved = second * gradient.square().sum(1, keepdim=True)
    return torch.cat([tanh, first * gradient, first * laplacian + curved], 1)
