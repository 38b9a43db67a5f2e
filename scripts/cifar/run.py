"""What a run is made of, and all of it that has to survive a restart."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar.batches import TrainingBatches
from cifar.datasets import load_dataset
from cifar.models import build_model
from cifar.settings import MAY_CHANGE, CifarSettings
from experiment.errors import RunError
from experiment.metrics import Row, Tally
from experiment.optimizers import build_optimizer
from experiment.processes import Processes
from experiment.random_states import random_states, restore_random_states, seed_everything
from experiment.schedules import build_scheduler
from experiment.settings import differing_keys
from kfac import KFAC


class Run:
    """Data, model, loss, optimizer, schedule and how far they have come.

    Args:
        settings: what to train, and how.
        processes: who takes part.
        directory: where the main process writes metrics, curves and checkpoints.
        name: stands before the progress bar and in the picture.
    """

    def __init__(
        self, settings: CifarSettings, processes: Processes, directory: Path, name: str
    ) -> None:
        self.settings, self.processes = settings, processes
        self.directory, self.name = directory, name
        torch.backends.cudnn.deterministic = True
        seed_everything(settings.seed)
        with processes.main_first():
            self.dataset = load_dataset(settings.data)
        self.batches = TrainingBatches(self.dataset, settings.data, settings.seed, processes)
        self.total_steps = settings.epochs * self.batches.per_epoch

        self.plain_model = build_model(settings.model, self.dataset.num_classes).to(
            processes.device
        )
        self.model = processes.replicate(self.plain_model)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        scaling = settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=scaling)
        self.optimizer = build_optimizer(
            settings.optimizer, self.model, self.criterion, self.scaler, settings.seed
        )
        self.scheduler = build_scheduler(
            self.optimizer, settings.schedule, settings.epochs, self.batches.per_epoch
        )
        self.step = 0
        self.seconds = 0.0
        self.tally = Tally(processes.device)
        self.rows: list[Row] = []

    def describe(self) -> str:
        settings, dataset, processes = self.settings, self.dataset, self.processes
        parameters = sum(parameter.numel() for parameter in self.plain_model.parameters())
        share = ""
        if isinstance(self.optimizer, KFAC):
            share = f" on {self.optimizer.summary().fraction('kfac'):.1%} of the parameters"
        return (
            f"{settings.model.name} ({parameters:,} parameters) on {settings.data.name} "
            f"({len(dataset.train):,} training and {len(dataset.test):,} test images)\n"
            f"{settings.optimizer.name}{share}, "
            f"{settings.epochs} x {self.batches.per_epoch} steps, seed {settings.seed}, "
            f"{processes.count} x {processes.device}, "
            f"{settings.precision}\n"
            f"from step {self.step} of {self.total_steps}, in {self.directory}"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; to be called in every process."""
        return {
            "settings": self.settings.model_dump(),
            "step": self.step,
            "seconds": self.seconds,
            "tally": self.processes.total(self.tally.sums),
            "rows": [asdict(row) for row in self.rows],
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_states": self.processes.gather(random_states()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken."""
        self.check_same_run(state)
        self.step, self.seconds = state["step"], state["seconds"]
        self.rows = [Row(**row) for row in state["rows"]]
        if self.processes.is_main:
            self.tally.sums.copy_(state["tally"])
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        restore_random_states(state["random_states"][self.processes.rank])

    def check_same_run(self, state: dict[str, Any]) -> None:
        changed = differing_keys(state["settings"], self.settings.model_dump())
        if fixed := [key for key in changed if key not in MAY_CHANGE]:
            raise RunError(
                f"The checkpoint was made with other settings of {', '.join(fixed)}. "
                f"Continue with the same ones; only {', '.join(sorted(MAY_CHANGE))} may change."
            )
        if len(state["random_states"]) != self.processes.count:
            raise RunError(
                f"The checkpoint was made by {len(state['random_states'])} processes, "
                f"but {self.processes.count} continue it; start as many."
            )
