"""Settings of the optimizers, and the optimizers themselves."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from experiment.settings import Settings
from kfac import KFAC
from kfac.inverse import InverseName

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class SGDSettings(Settings):
    name: Literal["sgd"]
    lr: PositiveFloat
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0


class AdamWSettings(Settings):
    name: Literal["adamw"]
    lr: PositiveFloat
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    weight_decay: NonNegativeFloat = 0.01


class KFACSettings(Settings):
    """The arguments of `kfac.KFAC`; what is left out has its default there."""

    name: Literal["kfac"]
    lr: PositiveFloat | None = None
    momentum: Fraction | None = None
    nesterov: bool | None = None
    weight_decay: NonNegativeFloat | None = None
    damping: PositiveFloat | None = None
    fisher: Literal["empirical", "mc", "type-2", "forward-only"] | None = None
    num_samples: PositiveInt | None = None
    max_vectors: PositiveInt | None = None
    weight_sharing: Literal["expand", "reduce"] | None = None
    inverse: InverseName | None = None
    factor_decay: Fraction | None = None
    factor_fraction: Share | None = None
    factor_update_period: PositiveInt | None = None
    inverse_update_period: PositiveInt | None = None
    refresh_tolerance: PositiveFloat | None = None
    kl_clip: NonNegativeFloat | None = None
    """Trust region of the step; 0 turns it off."""
    skip: list[str] | None = None
    """Names or globs of layers that the fallback trains."""
    fallback: Literal["sgd", "adamw"] | None = None
    max_factor_dim: PositiveInt | None = None
    seed: int | None = None
    """Seed of the sampled Fisher; the seed of the run if left out."""


OptimizerSettings = Annotated[
    KFACSettings | SGDSettings | AdamWSettings, Field(discriminator="name")
]


def build_optimizer(
    settings: KFACSettings | SGDSettings | AdamWSettings,
    model: nn.Module,
    criterion: nn.Module,
    scaler: torch.amp.GradScaler,
    seed: int,
) -> torch.optim.Optimizer:
    match settings:
        case SGDSettings():
            arguments = settings.model_dump(exclude={"name"})
            return torch.optim.SGD(model.parameters(), **arguments)
        case AdamWSettings():
            arguments = settings.model_dump(exclude={"name", "beta1", "beta2"})
            betas = (settings.beta1, settings.beta2)
            return torch.optim.AdamW(model.parameters(), betas=betas, **arguments)
        case KFACSettings():
            arguments = {"seed": seed} | kfac_arguments(settings)
            if scaler.is_enabled():
                arguments["grad_scaler"] = scaler
            return KFAC(model, criterion=criterion, **arguments)


def kfac_arguments(settings: KFACSettings) -> dict[str, Any]:
    arguments = settings.model_dump(exclude={"name"}, exclude_none=True)
    if settings.kl_clip == 0:
        arguments["kl_clip"] = None
    return arguments
