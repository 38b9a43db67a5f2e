from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torchvision

from cifar.batches import EpochPlan, TrainingBatches, crop, evaluation_batches
from cifar.datasets import Dataset, load_dataset
from cifar.settings import DataSettings
from experiment.errors import RunError
from experiment.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataSettings())


def batches(digits: Dataset, rank: int = 0, count: int = 1, seed: int = 0) -> TrainingBatches:
    settings = DataSettings(batch_size=64, augmentation="crop-flip")
    return TrainingBatches(digits, settings, seed, Processes(CPU, rank, count))


def test_digits_have_the_shape_of_cifar(digits: Dataset) -> None:
    assert digits.train.pixels.shape == (1347, 3, 32, 32)
    assert digits.test.pixels.shape == (450, 3, 32, 32)
    assert digits.train.pixels.dtype == torch.uint8
    assert digits.train.pixels.max() == 255
    normalised = digits.normalised(digits.train.pixels)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_the_split_is_disjoint_stratified_and_always_the_same(digits: Dataset) -> None:
    train, test = (
        {tuple(image.flatten().tolist()) for image in part.pixels[:, 0]}
        for part in (digits.train, digits.test)
    )
    assert len(train) + len(test) == 1797
    assert not train & test
    counts = torch.bincount(digits.test.labels)
    assert counts.min() >= 43
    assert counts.max() <= 46
    assert torch.equal(load_dataset(DataSettings()).test.pixels, digits.test.pixels)


def test_an_epoch_shows_every_image_at_most_once_in_a_seeded_order(digits: Dataset) -> None:
    plan = EpochPlan.draw(100, seed=0, epoch=0)
    assert torch.equal(plan.order.sort().values, torch.arange(100))
    assert torch.equal(plan.order, EpochPlan.draw(100, seed=0, epoch=0).order)
    assert not torch.equal(plan.order, EpochPlan.draw(100, seed=0, epoch=1).order)
    assert not torch.equal(plan.order, EpochPlan.draw(100, seed=1, epoch=0).order)
    assert batches(digits).per_epoch == 21


def test_any_step_can_be_drawn_on_its_own(digits: Dataset) -> None:
    in_order = batches(digits)
    drawn = [in_order[step] for step in range(30)]
    images, labels = batches(digits)[29]
    assert torch.equal(images, drawn[29][0])
    assert torch.equal(labels, drawn[29][1])


def test_processes_share_the_batch_of_one(digits: Dataset) -> None:
    images, labels = batches(digits)[25]
    for rank in range(2):
        part, part_labels = batches(digits, rank, 2)[25]
        assert torch.equal(part, images[rank::2])
        assert torch.equal(part_labels, labels[rank::2])
    shares = [
        sum(len(labels) for _, labels in evaluation_batches(digits, Processes(CPU, rank, 4)))
        for rank in range(4)
    ]
    assert sum(shares) == 450


def test_crop_cuts_and_mirrors_each_image_by_itself() -> None:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    offsets = torch.tensor([[4, 4], [4, 4], [0, 8], [8, 1]])
    mirrored = torch.tensor([False, True, False, True])
    result = crop(pixels, offsets, mirrored)
    padded = torch.nn.functional.pad(pixels, (4,) * 4)
    assert torch.equal(result[0], pixels[0])
    assert torch.equal(result[1], pixels[1].flip(-1))
    assert torch.equal(result[2], padded[2, :, 0:32, 8:40])
    assert torch.equal(result[3], padded[3, :, 8:40, 1:33].flip(-1))


def test_digits_are_not_augmented_by_default(digits: Dataset) -> None:
    plain = TrainingBatches(digits, DataSettings(batch_size=1347), 0, Processes(CPU))
    images, labels = plain[0]
    assert torch.equal(images, digits.normalised(digits.train.pixels[plain.plan.order]))
    assert torch.equal(labels, digits.train.labels[plain.plan.order])


@pytest.mark.parametrize(
    ("batch_size", "count", "message"),
    [
        (2000, 1, r"data\.batch_size must be at most 1347, .* but got 2000"),
        (63, 2, r"data\.batch_size must be a multiple of the 2 processes, but got 63"),
    ],
)
def test_impossible_batch_sizes_are_refused(
    digits: Dataset, batch_size: int, count: int, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        TrainingBatches(digits, DataSettings(batch_size=batch_size), 0, Processes(CPU, 0, count))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_a_network_the_error_tells_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **options: object) -> NoReturn:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    settings = DataSettings.model_validate({"name": name, "root": str(tmp_path)})
    with pytest.raises(RunError) as error:
        load_dataset(settings)
    message = str(error.value)
    folder = {"cifar10": "cifar-10-batches-py/", "cifar100": "cifar-100-python/"}[name]
    for part in (str(tmp_path), "no network", ".tar.gz", folder, "data.name=digits"):
        assert part in message
