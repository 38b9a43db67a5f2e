"""What a run is made of, and all of it that has to survive a restart."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar.batches import TrainingBatches
from cifar.datasets import load_dataset
from cifar.models import build_model
from cifar.settings import MAY_CHANGE, CifarSettings
from experiment.errors import RunError
from experiment.layout import check_layout
from experiment.metrics import COLUMNS, Row, Tally, best_accuracy
from experiment.optimizers import build_optimizer
from experiment.processes import Processes
from experiment.random_states import random_states, restore_random_states, seed_everything
from experiment.schedules import build_scheduler
from experiment.settings import differing_keys
from kfac import KFAC

CONTENT = {
    "settings": dict,
    "step": int,
    "seconds": float,
    "tally": Tensor,
    "rows": list,
    "best": dict,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "random_states": list,
}
"""What a checkpoint holds."""
ROW = {column: int if column == "step" else float for column in COLUMNS}


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
        self.best: dict[str, Any] = {}

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

    def add_row(self, row: Row) -> None:
        """Keep the weights with it if they are the best so far: to use, not to continue from."""
        if row.test_accuracy > best_accuracy(self.rows):
            weights = {key: t.clone() for key, t in self.plain_model.state_dict().items()}
            self.best = {"row": asdict(row), "model": weights}
        self.rows.append(row)
        self.tally = Tally(self.processes.device)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; to be called in every process.

        The learning rate needs no entry: its schedule is a function of the step.
        """
        return {
            "settings": self.settings.model_dump(),
            "step": self.step,
            "seconds": self.seconds,
            "tally": self.processes.total(self.tally.sums),
            "rows": [asdict(row) for row in self.rows],
            "best": self.best,
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_states": self.processes.gather(random_states()),
        }

    def load_state_dict(self, state: dict[str, Any], source: Path) -> None:
        """Go on exactly where `state` was taken.

        Args:
            state: what `state_dict` returned.
            source: the file that it is from, for messages.

        Raises:
            RunError: If it is not the state of this run, which then is as it was.
        """
        before = random_states()
        try:
            check_layout("the checkpoint", state, CONTENT)
            self.check_same_run(state, source)
            self.check_parts(state)
            restore_random_states(state["random_states"][self.processes.rank])
            self.optimizer.load_state_dict(state["optimizer"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            restore_random_states(before)
            raise RunError(
                f"{source} does not fit this run: {error} Resume from a checkpoint that this "
                "version of the script made, or leave --resume out to start anew."
            ) from error
        self.plain_model.load_state_dict(state["model"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.scheduler.last_epoch = self.step
        self.rows, self.best = [Row(**row) for row in state["rows"]], state["best"]
        if self.processes.is_main:
            self.tally.sums.copy_(state["tally"])

    def check_same_run(self, state: dict[str, Any], source: Path) -> None:
        changed = differing_keys(state["settings"], self.settings.model_dump())
        if fixed := [key for key in changed if key not in MAY_CHANGE]:
            raise RunError(
                f"{source} was made with other settings of {', '.join(fixed)}. "
                f"Continue with the same ones; only {', '.join(sorted(MAY_CHANGE))} may change."
            )
        if len(state["random_states"]) != self.processes.count:
            raise RunError(
                f"{source} was made by {len(state['random_states'])} processes, "
                f"but {self.processes.count} continue it; start as many."
            )

    def check_parts(self, state: dict[str, Any]) -> None:
        """Raise `ValueError` where a part could not be loaded; the optimizer checks its own."""
        weights = self.plain_model.state_dict()
        check_layout("model", state["model"], weights)
        check_layout("tally", state["tally"], self.tally.sums)
        check_layout("scaler", state["scaler"], self.scaler.state_dict())
        for number, row in enumerate(state["rows"]):
            check_layout(f"row {number}", row, ROW)
        best = {"row": ROW, "model": weights}
        check_layout("best", state["best"], best if state["rows"] else {})
        own = self.optimizer.state_dict()
        check_layout("optimizer", state["optimizer"], {key: type(own[key]) for key in own})
        groups = zip(state["optimizer"]["param_groups"], own["param_groups"], strict=True)
        for number, (group, mine) in enumerate(groups):
            check_layout(f"group {number} of the optimizer", group, mine)
            if group["params"] != mine["params"]:
                raise ValueError(f"group {number} of the optimizer has other parameters.")
