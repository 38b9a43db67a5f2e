"""Learning rate over time, as a factor on the learning rate of the settings."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from experiment.settings import Settings


class Warmup(Settings):
    warmup_epochs: NonNegativeFloat = 0.0
    """The learning rate grows linearly over so many epochs."""


class ConstantSchedule(Warmup):
    name: Literal["constant"] = "constant"


class CosineSchedule(Warmup):
    name: Literal["cosine"] = "cosine"
    final_factor: NonNegativeFloat = 0.0
    """Where half a cosine ends, as a fraction of the learning rate."""


class StepSchedule(Warmup):
    name: Literal["step"] = "step"
    milestones: list[PositiveFloat]
    """Epochs at which the learning rate is multiplied by gamma."""
    gamma: PositiveFloat = 0.1


Schedule = ConstantSchedule | CosineSchedule | StepSchedule
ScheduleSettings = Annotated[Schedule, Field(discriminator="name")]


def build_scheduler(
    optimizer: Optimizer, schedule: Schedule, epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """A scheduler to step after every optimizer step."""
    return LambdaLR(optimizer, lambda step: factor(schedule, step, epochs, steps_per_epoch))


def factor(schedule: Schedule, step: int, epochs: int, steps_per_epoch: int) -> float:
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    if step + 1 < warmup_steps:
        return (step + 1) / warmup_steps
    epoch = step / steps_per_epoch
    match schedule:
        case ConstantSchedule():
            return 1.0
        case CosineSchedule(final_factor=final):
            done = (epoch - schedule.warmup_epochs) / max(epochs - schedule.warmup_epochs, 1e-9)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0), 1)))
        case StepSchedule(milestones=milestones, gamma=gamma):
            return float(gamma ** sum(epoch >= milestone for milestone in milestones))
