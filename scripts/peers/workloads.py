"""Models of layers that every package supports, with random data of fixed shape."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
TOKENS = 256


class Workload(NamedTuple):
    description: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]


class Attention(nn.Module):
    """Causal self-attention from four linear layers; few packages know nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        result: Tensor = x + self.mlp(x)
        return result


class Transformer(nn.Module):
    """Predicts the next token of every position: logits ``[N·T, TOKENS]``."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(self.tokens(x))))
        return logits.flatten(0, 1)


def resnet20() -> nn.Module:
    from cifar.models import resnet20  # torchvision would count in the memory of the others

    return resnet20(10)


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 10)
    )


def images(size: int) -> Batch:
    return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))


def sequences(size: int, length: int) -> Batch:
    text = torch.randint(TOKENS, (size, length + 1))
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


WORKLOADS = {
    "resnet20": Workload("ResNet-20, 3×32×32, batch 128", resnet20, lambda: images(128)),
    "transformer": Workload(
        "transformer: 6 layers, width 384, sequences of 128, batch 32",
        lambda: Transformer(6, 384, 6),
        lambda: sequences(32, 128),
    ),
    "tiny": Workload("a convolution and a linear layer, batch 8", tiny, lambda: images(8)),
    "tiny-transformer": Workload(
        "transformer: 1 layer, width 8, sequences of 6, batch 4",
        lambda: Transformer(1, 8, 2),
        lambda: sequences(4, 6),
    ),
}
