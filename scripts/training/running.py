"""One run: steps against the clock, evaluations beside it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from training.contenders import CONTENDERS, Entry, Trainer
from training.data import Batches, Examples
from training.results import BEHIND, Evaluation, Record
from training.targets import Target
from training.tasks import Task

Clock = Callable[[], float]
CHUNK = 2048


class Run:
    """A model in training.

    The seed decides the initial weights and the order of the examples, whatever the optimizer.

    Args:
        task: What is learnt.
        contender: The name of an optimizer.
        learning_rate: Its learning rate; None for its default.
        seed: Of weights and order.
        device: Where to compute.
        clock: Tells seconds.
    """

    def __init__(
        self,
        task: Task,
        contender: str,
        learning_rate: float | None,
        seed: int,
        device: torch.device,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.device, self.clock = device, clock
        data = task.data()
        self.batches = Batches(data.train.to(device), task.batch_size, seed)
        self.evaluated = data.evaluation.to(device)
        torch.manual_seed(seed)
        self.model = task.model().to(device)
        self.criterion = task.criterion().to(device)
        # K-FAC watches the criterion of the loop, and evaluations are none of its business.
        self.evaluation_criterion = task.criterion().to(device)
        self.contender = CONTENDERS[contender]
        self.entry = Entry(self.model, self.criterion, learning_rate, seed)
        self.step, self.seconds = 0, 0.0

    @cached_property
    def trainer(self) -> Trainer:
        return self.contender.build(self.entry)

    def train_step(self) -> float:
        """Take one step on the clock; returns the loss of its batch."""
        trainer = self.trainer
        inputs, targets = self.batches[self.step]
        self.model.train()
        self.synchronize()
        started = self.clock()
        loss = trainer.step(lambda: self.criterion(self.model(inputs), targets))
        self.synchronize()
        self.seconds += self.clock() - started
        self.step += 1
        return loss.item()

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def evaluate(self) -> Evaluation:
        loss, accuracy = evaluate(self.model, self.evaluation_criterion, self.evaluated)
        return Evaluation(self.step, self.seconds, loss, accuracy)


@torch.no_grad()
def evaluate(
    model: nn.Module, criterion: nn.Module, examples: Examples
) -> tuple[float, float | None]:
    """Mean loss per example, and the share of correct labels if there are labels."""
    model.eval()
    loss = correct = labels = 0.0
    for batch in chunks(examples):
        inputs, targets = batch
        outputs = model(inputs)
        loss += criterion(outputs, targets).item() * len(inputs)
        if not targets.is_floating_point():
            correct += (outputs.argmax(1) == targets).sum().item()
            labels += len(targets)
    return loss / len(examples.inputs), correct / labels if labels else None


def chunks(examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(examples.inputs), CHUNK):
        yield examples.batch(slice(start, start + CHUNK))


def carry_out(
    run: Run,
    task: Task,
    configuration: Mapping[str, Any],
    stop: Target | None,
    max_seconds: float,
    limit: int | None = None,
    advanced: Callable[[Evaluation | None], None] = lambda evaluation: None,
) -> Record:
    """Train to the target or the end of the budget.

    A loss that is not finite ends the run too, and so does an error, for the sake of those that
    are to follow.

    Args:
        run: As constructed.
        task: Says how many steps there are at most, and after how many to evaluate.
        configuration: For the record.
        stop: Where to stop; None to use up the budget.
        max_seconds: Training time at most; the step that exceeds it is the last.
        limit: Steps after which the run is behind another one, and ends; None for the task's.
        advanced: Called after every step, with the evaluation if there was one.
    """
    evaluations = [run.evaluate()]
    max_steps = limit or task.max_steps
    outcome = ""
    while not outcome:
        try:
            finite = math.isfinite(run.train_step())
        except Exception as error:
            message = (str(error).splitlines() or [""])[0]
            outcome = f"failed at step {run.step}: {type(error).__name__}: {message}"
            break
        over = run.step >= max_steps or run.seconds >= max_seconds
        evaluation = run.evaluate() if over or run.step % task.evaluate_every == 0 else None
        if not (finite and (evaluation is None or math.isfinite(evaluation.loss))):
            outcome = f"diverged at step {run.step}"
            break
        if evaluation is not None:
            evaluations.append(evaluation)
            if stop is not None and stop.reached(evaluation):
                outcome = "target"
        if over and not outcome:
            if run.step < max_steps:
                outcome = "seconds"
            else:
                outcome = "steps" if run.step >= task.max_steps else BEHIND
        advanced(evaluation)
    return Record(configuration, tuple(evaluations), outcome, run.step, run.seconds)
