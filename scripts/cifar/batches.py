"""Batches as a function of the step number: nothing to save, so any step can be resumed from."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.datasets import Dataset, Images
from cifar.settings import DataSettings
from experiment.errors import RunError
from experiment.processes import Processes

SIZE = 32
PADDING = 4
TEST_BATCH = 512


@dataclass(frozen=True)
class EpochPlan:
    """Order of the images [N] in one epoch; offset [N, 2] of the crop and mirroring [N] of each."""

    order: Tensor
    offsets: Tensor
    mirrored: Tensor

    @staticmethod
    def draw(count: int, seed: int, epoch: int) -> "EpochPlan":
        """Drawn for the whole epoch from a generator of its own, the same in every process."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        offsets = torch.randint(0, 2 * PADDING + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        return EpochPlan(order, offsets, mirrored)


class TrainingBatches:
    """Shuffled batches of `batch_size` images, of which every process gets an equal share."""

    def __init__(
        self, dataset: Dataset, settings: DataSettings, seed: int, processes: Processes
    ) -> None:
        batch_size = settings.batch_size
        if batch_size > len(dataset.train):
            raise RunError(
                f"data.batch_size must be at most {len(dataset.train)}, the number of training "
                f"images, but got {batch_size}."
            )
        if batch_size % processes.count:
            raise RunError(
                f"data.batch_size must be a multiple of the {processes.count} processes, "
                f"but got {batch_size}."
            )
        self.dataset, self.batch_size = dataset, batch_size
        self.augmentation = settings.augmentation
        if self.augmentation == "auto":
            self.augmentation = "none" if settings.name == "digits" else "crop-flip"
        self.images = dataset.train.to(processes.device)
        self.seed, self.processes = seed, processes
        self.per_epoch = len(dataset.train) // batch_size
        self.epoch = -1

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [n, 3, 32, 32] and labels [n] of one step; the last partial batch is left out."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, EpochPlan.draw(len(self.images), self.seed, epoch)
        batch = slice(position * self.batch_size, (position + 1) * self.batch_size)
        chosen = self.plan.order[batch][self.processes.rank :: self.processes.count]
        device = self.processes.device
        indices = chosen.to(device)
        pixels = self.images.pixels[indices]
        if self.augmentation != "none":
            mirrored = self.plan.mirrored[chosen] & (self.augmentation == "crop-flip")
            pixels = crop(pixels, self.plan.offsets[chosen].to(device), mirrored.to(device))
        return self.dataset.normalised(pixels), self.images.labels[indices]


def crop(pixels: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
    """Cut 32×32 at `offsets` [N, 2] out of images padded by 4 zeros, mirrored where asked."""
    padded = F.pad(pixels, (PADDING,) * 4)
    positions = torch.arange(SIZE, device=pixels.device)
    rows = offsets[:, :1] + positions
    columns = offsets[:, 1:] + torch.where(mirrored[:, None], SIZE - 1 - positions, positions)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # Indices on both sides of the channel slice put the channels last.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def evaluation_batches(dataset: Dataset, processes: Processes) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the test set."""
    share = slice(processes.rank, None, processes.count)
    images = Images(dataset.test.pixels[share], dataset.test.labels[share]).to(processes.device)
    for start in range(0, len(images), TEST_BATCH):
        batch = slice(start, start + TEST_BATCH)
        yield dataset.normalised(images.pixels[batch]), images.labels[batch]
