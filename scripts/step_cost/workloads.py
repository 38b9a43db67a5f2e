"""Models with random data of fixed shape."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cifar.models import resnet18, resnet20

Batch = tuple[Tensor, Tensor]
BYTES = 256


class Workload(NamedTuple):
    description: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]


class ByteTransformer(nn.Module):
    """A pre-norm transformer without dropout that predicts the next byte of every position."""

    def __init__(self, layers: int, width: int, heads: int, feed_forward: int, length: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, feed_forward, dropout=0.0, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.encoder = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, BYTES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))
        self.register_buffer("places", torch.arange(length))

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.bytes(x) + self.positions(self.places)
        logits: Tensor = self.head(self.encoder(embedded, mask=self.mask, is_causal=True))
        return logits.flatten(0, 1)


def images(size: int, classes: int = 10) -> Batch:
    return torch.randn(size, 3, 32, 32), torch.randint(0, classes, (size,))


def sequences(size: int, length: int) -> Batch:
    text = torch.randint(0, BYTES, (size, length + 1))
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


def tiny() -> nn.Sequential:
    convolution, norm = nn.Conv2d(3, 4, 3, stride=8, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


WORKLOADS = {
    "resnet20": Workload(
        "ResNet-20, 3×32×32 images, batch 128", lambda: resnet20(10), lambda: images(128)
    ),
    "resnet18": Workload(
        "ResNet-18 with the stem for small images, 3×32×32, batch 64",
        lambda: resnet18(10),
        lambda: images(64),
    ),
    "transformer": Workload(
        "transformer: 6 layers, width 384, 128 bytes, batch 32",
        lambda: ByteTransformer(6, 384, 6, 1536, 128),
        lambda: sequences(32, 128),
    ),
    "tiny": Workload("a convolution and a linear layer, batch 8", tiny, lambda: images(8)),
    "tiny-transformer": Workload(
        "transformer: 1 layer, width 8, 6 bytes, batch 4",
        lambda: ByteTransformer(1, 8, 2, 16, 6),
        lambda: sequences(4, 6),
    ),
}
