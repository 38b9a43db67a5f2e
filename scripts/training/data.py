"""Data sets that need no download, and the order in which an optimizer sees their examples."""

import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from cifar.datasets import digits
from training.curves import draw_curves

SEED = 0  # of what is generated; the seeds of the runs decide weights and order only
BOUNDARY_WEIGHT = 10.0  # of u beside Δu, whose scale is 8π²; squared in the loss
WAVEFORMS = ("sine", "square", "triangle", "sawtooth", "pulse", "beat", "chirp", "decay")


class Examples(NamedTuple):
    """Inputs and targets, one example a row; labels are integers, ``[N]`` or ``[N, positions]``."""

    inputs: Tensor
    targets: Tensor

    def batch(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Labels come as one list, in the order of the rows of logits."""
        targets = self.targets[chosen]
        return self.inputs[chosen], targets if targets.is_floating_point() else targets.flatten()

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.inputs.to(device), self.targets.to(device))


class Data(NamedTuple):
    """What is trained on, and what the evaluations between steps are made on."""

    train: Examples
    evaluation: Examples


class Batches:
    """Shuffled batches as a function of the step: the same for every optimizer with one seed."""

    def __init__(self, examples: Examples, size: int, seed: int) -> None:
        self.examples, self.size, self.seed = examples, size, seed
        self.per_epoch = len(examples.inputs) // size
        self.epoch = -1

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.examples.inputs), generator=generator)
            self.epoch = epoch
        return self.examples.batch(self.order[position * self.size : (position + 1) * self.size])


@cache
def digit_images() -> Data:
    """scikit-learn's digits, enlarged to 3×32×32; evaluated on the quarter that is held out."""
    dataset = digits(test_fraction=0.25)
    train, test = (
        Examples(dataset.normalised(images.pixels), images.labels)
        for images in (dataset.train, dataset.test)
    )
    return Data(train, test)


@cache
def digit_images_to_fit() -> Data:
    """The same training images, and the evaluation on all of them."""
    train, _ = digit_images()
    return Data(train, train)


@cache
def digit_pixels() -> Data:
    """scikit-learn's 8×8 digits in [0, 1], to be reproduced."""
    pixels = torch.from_numpy(load_digits().data).float() / 16
    return reproduced(pixels, len(pixels))


@cache
def curve_images() -> Data:
    """20,000 curves, to be reproduced; evaluated on the first 2,000 of them."""
    return reproduced(draw_curves(20_000, SEED), 2_000)


def reproduced(images: Tensor, evaluated: int) -> Data:
    return Data(Examples(images, images), Examples(images[:evaluated], images[:evaluated]))


@cache
def waveforms() -> Data:
    """Noisy periods of eight kinds, one channel of 128 samples; evaluated on 1,000 more."""
    waves, labels = draw_waveforms(9_000, SEED)
    return Data(Examples(waves[1_000:], labels[1_000:]), Examples(waves[:1_000], labels[:1_000]))


def draw_waveforms(count: int, seed: int, length: int = 128) -> tuple[Tensor, Tensor]:
    """Waves ``[count, 1, length]`` of random kind, frequency, phase, amplitude and noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    labels = torch.randint(len(WAVEFORMS), (count,), generator=generator)
    time = torch.linspace(0, 1, length)
    frequency, phase = uniform(3, 8), uniform(0, 1)
    cycles = frequency * time + phase
    angle, fraction = 2 * torch.pi * cycles, cycles.frac()
    kinds = [
        angle.sin(),
        angle.sin().sign(),
        4 * (fraction - 0.5).abs() - 1,
        2 * fraction - 1,
        torch.where(fraction < 0.25, 1.0, -1.0),
        angle.sin() * (angle / 4).cos(),
        (2 * torch.pi * (cycles + frequency * time**2 / 2)).sin(),
        angle.sin() * torch.exp(-2 * time),
    ]
    clean = torch.stack(kinds)[labels, torch.arange(count)]
    noise = torch.randn(count, length, generator=generator)
    return (uniform(0.5, 2) * clean + uniform(0.1, 0.6) * noise)[:, None], labels


@cache
def source_text(length: int = 64, trained: int = 1_000_000, evaluated: int = 16_384) -> Data:
    """Windows of Python's standard library, every byte a label of those before it.

    The first bytes of its top-level modules in the order of their names; the evaluation is made on
    the bytes after those that are trained on.
    """
    text = standard_library(trained + evaluated)
    return Data(windows(text[:trained], length), windows(text[trained:], length))


def standard_library(size: int) -> Tensor:
    """The first `size` bytes, as integers."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            return torch.frombuffer(text, dtype=torch.uint8)[:size].long()
    raise RuntimeError(f"{folder} holds {len(text):,} bytes of Python, and {size:,} are needed.")


def windows(text: Tensor, length: int) -> Examples:
    count = (len(text) - 1) // length
    inputs, targets = text[: count * length], text[1 : count * length + 1]
    return Examples(inputs.view(count, length), targets.view(count, length))


@cache
def poisson_points() -> Data:
    """Points of the unit square for −Δu = f with u = sin 2πx · sin 2πy + xy; see `Poisson`.

    A fifth of them lies on the boundary. Evaluated on 2,000 points that are not trained on.
    """
    points, values = draw_poisson(12_000, SEED)
    return Data(Examples(points[2_000:], values[2_000:]), Examples(points[:2_000], values[:2_000]))


def draw_poisson(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points ``[count, 3]`` (x, y, 1 inside) and ``[count, 1]``: f, weighted u on the boundary."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 2, generator=generator)
    inside = torch.arange(count) % 5 != 0
    side = torch.randint(4, (count,), generator=generator)
    axis, end = side // 2, (side % 2).float()
    moved = points.scatter(1, axis[:, None], end[:, None])
    points = torch.where(inside[:, None], points, moved)
    waves = (2 * torch.pi * points).sin().prod(1)
    u = waves + points.prod(1)
    values = torch.where(inside, 8 * torch.pi**2 * waves, BOUNDARY_WEIGHT * u)
    return torch.cat([points, inside[:, None].float()], 1), values[:, None]
