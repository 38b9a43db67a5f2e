"""Data sets as whole tensors in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from cifar.settings import DataSettings
from experiment.errors import RunError

CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATISTICS = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """`pixels` [N, 3, 32, 32] as bytes and `labels` [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))

    def first(self, count: int | None) -> "Images":
        return Images(self.pixels[:count], self.labels[:count])


@dataclass(frozen=True)
class Dataset:
    """Both splits, and the `mean` and `std` [3] of the training pixels on the scale 0 to 1."""

    train: Images
    test: Images
    num_classes: int
    mean: Tensor
    std: Tensor

    def normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (values.to(pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def load_dataset(settings: DataSettings) -> Dataset:
    match settings.name:
        case "digits":
            dataset = digits(settings.test_fraction)
        case "cifar10":
            cifar10 = torchvision.datasets.CIFAR10
            dataset = cifar(cifar10, Path(settings.root), 10, CIFAR10_STATISTICS)
        case "cifar100":
            cifar100 = torchvision.datasets.CIFAR100
            dataset = cifar(cifar100, Path(settings.root), 100, CIFAR100_STATISTICS)
    train, test = dataset.train.first(settings.limit), dataset.test.first(settings.limit)
    return Dataset(train, test, dataset.num_classes, dataset.mean, dataset.std)


def digits(test_fraction: float) -> Dataset:
    """scikit-learn's 8×8 grey digits, enlarged; the stratified split is the same for every seed."""
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    pixels = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    pixels = pixels.round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = (
        Images(pixels[indices].contiguous(), labels[indices])
        for indices in train_test_split(
            np.arange(len(labels)),
            test_size=test_fraction,
            stratify=labels,
            random_state=SPLIT_SEED,
        )
    )
    scaled = train.pixels.float() / 255
    return Dataset(train, test, 10, scaled.mean((0, 2, 3)), scaled.std((0, 2, 3)))


def cifar(
    source: Any, root: Path, num_classes: int, statistics: tuple[tuple[float, ...], ...]
) -> Dataset:
    try:
        train, test = (source(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise RunError(missing_data(source, root, error)) from None
    mean, std = (torch.tensor(values) for values in statistics)
    return Dataset(from_torchvision(train), from_torchvision(test), num_classes, mean, std)


def from_torchvision(dataset: Any) -> Images:
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(dataset.targets))


def missing_data(source: Any, root: Path, error: Exception) -> str:
    files = [name for name, _ in (*source.train_list, *source.test_list)] + [
        source.meta["filename"]
    ]
    return (
        f"{source.__name__} is not in {root.resolve()} and cannot be downloaded ({error}).\n"
        f"Without a network, put one of these into that folder (data.root sets another):\n"
        f"  {source.filename}, from {source.url}\n"
        f"  {source.base_folder}/ with {', '.join(files)}\n"
        f"or train on the embedded digits: data.name=digits"
    )
