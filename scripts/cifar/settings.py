from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from experiment.optimizers import OptimizerSettings
from experiment.schedules import ConstantSchedule, ScheduleSettings
from experiment.settings import Settings

ModelName = Literal["resnet20", "resnet18", "vgg11"]
DatasetName = Literal["digits", "cifar10", "cifar100"]
Augmentation = Literal["auto", "none", "crop", "crop-flip"]


class ModelSettings(Settings):
    name: ModelName = "resnet20"
    channels_last: bool = True
    """Memory format of images; true is faster on CPUs and with reduced precision on GPUs."""


class DataSettings(Settings):
    name: DatasetName = "digits"
    """digits needs no download: 1,797 handwritten digits, embedded in scikit-learn."""
    root: str = "data"
    """Folder of downloaded data."""
    batch_size: PositiveInt = 128
    """Images per step, over all processes."""
    augmentation: Augmentation = "auto"
    """auto: crop-flip for CIFAR, none for digits."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Part of the digits that is held out for testing."""
    limit: PositiveInt | None = None
    """Use only so many training images and as many test images, for a quick try."""


class CifarSettings(Settings):
    seed: NonNegativeInt = 0
    """Decides initial weights, order of the data, augmentation and sampling."""
    epochs: PositiveInt = 10
    evaluations_per_epoch: PositiveInt = 1
    checkpoints_per_epoch: NonNegativeInt = 1
    """0: only at the end."""
    stop_at_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """End the run as soon as an evaluation reaches this test accuracy."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The two short ones by autocast, float16 with loss scaling."""
    label_smoothing: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings
    schedule: ScheduleSettings = ConstantSchedule()


MAY_CHANGE = frozenset(
    {
        "checkpoints_per_epoch",
        "data.root",
        "device",
        "epochs",
        "evaluations_per_epoch",
        "stop_at_accuracy",
    }
)
"""Settings that may differ between a checkpoint and the run that continues from it."""
