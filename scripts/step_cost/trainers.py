"""One training step of each optimizer, in pieces that timers can wrap."""

import argparse
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfac import KFAC
from kfac.preconditioner import Preconditioner
from step_cost.schedule import Layers
from step_cost.workloads import Batch, Workload

NEVER = 2**40


class Trainer:
    """A model and its optimizer.

    Args:
        model: The model.
        criterion: Its loss.
        optimizer: Its optimizer.
        autocast: Type that the forward pass is cast to, None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.autocast = autocast

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.backward(self.forward(batch))
        self.update()

    def forward(self, batch: Batch) -> Tensor:
        x, target = batch
        context: AbstractContextManager[object] = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(x.device.type, self.autocast)
        with context:
            loss: Tensor = self.criterion(self.model(x), target)
        return loss

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def update(self) -> None:
        self.optimizer.step()


class KFACTrainer(Trainer):
    """K-FAC, told what each step is to do instead of following its periods."""

    optimizer: KFAC

    @property
    def engine(self) -> Preconditioner:
        return self.optimizer._engine

    def ordinary_step(self, batch: Batch) -> None:
        self.engine.capture.schedule(active=False)
        self.step(batch)

    def factor_step(self, batch: Batch) -> None:
        self.engine.capture.schedule(active=True)
        self.step(batch)

    @torch.no_grad()
    def refresh(self, layers: Layers) -> None:
        """Refresh what a step of the schedule would, if the factors are new since the last time."""
        self.engine.blocks.refresh(self.optimizer._damping_by_layer(), layers)


class Contest:
    """The same model under every optimizer, each with a copy of its own."""

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        device = torch.device(options.device)
        state = workload.model().state_dict()
        x, target = workload.batch()
        self.batch: Batch = (x.to(device), target.to(device))

        def model() -> nn.Module:
            copy = workload.model()
            copy.load_state_dict(state)
            return copy.to(device)

        autocast = torch.bfloat16 if options.dtype == "bfloat16" else None

        def trainer(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Trainer:
            network = model()
            optimizer = make(network.parameters(), **settings)
            return Trainer(network, nn.CrossEntropyLoss(), optimizer, autocast)

        self.baselines: Mapping[str, Trainer] = {
            "SGD": trainer(torch.optim.SGD, lr=0.01, momentum=0.9),
            "AdamW": trainer(torch.optim.AdamW),
        }
        network, criterion = model(), nn.CrossEntropyLoss()
        optimizer = KFAC(
            network,
            criterion=criterion,
            factor_update_period=NEVER,
            inverse_update_period=NEVER,
            **kfac_settings(options),
        )
        self.kfac = KFACTrainer(network, criterion, optimizer, autocast)

    def classes(self) -> dict[str, Callable[[], None]]:
        """A step of every class, by name."""
        kfac, batch = self.kfac, self.batch
        steps: dict[str, Callable[[], None]] = {
            name: lambda trainer=trainer: trainer.step(batch)  # type: ignore[misc]
            for name, trainer in self.baselines.items()
        }
        return steps | {
            "ordinary": lambda: kfac.ordinary_step(batch),
            "factor": lambda: kfac.factor_step(batch),
        }


def kfac_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `kfac.KFAC` that were given; what is left out has its default there."""
    chosen = {"fisher": options.fisher, "inverse": options.inverse}
    settings: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    if options.no_stagger:
        settings["stagger_refreshes"] = False
    return settings
