"""The training loop: steps, evaluations, checkpoints."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.batches import evaluation_batches
from cifar.run import Run
from experiment.checkpoints import BEST, LATEST, save_checkpoint
from experiment.curves import draw_curves
from experiment.metrics import Means, MetricsLog, Row, Tally, best_accuracy
from experiment.progress import Progress
from experiment.whole_files import partial_files

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def train(run: Run) -> list[Row]:
    """Train to the end, or to `stop_at_accuracy`; returns a row per evaluation."""
    if run.processes.is_main:
        bring_folder_to(run)
    evaluations = stops(run, run.settings.evaluations_per_epoch)
    checkpoints = stops(run, run.settings.checkpoints_per_epoch)
    with reporting(run) as (progress, log):
        for stop in sorted(evaluations | checkpoints):
            if stop <= run.step or accurate_enough(run):
                continue
            train_until(run, stop, progress)
            if stop in evaluations:
                evaluate(run, progress, log)
            if stop in checkpoints or accurate_enough(run):
                save_latest(run)
    return run.rows


def bring_folder_to(run: Run) -> None:
    """Remove or replace what an earlier run, or a later part of this one, has left.

    `latest.pt` alone says how far a run has come; metrics and curves are written from it too.
    """
    if run.step == 0:
        (run.directory / LATEST).unlink(missing_ok=True)
    for path in partial_files(run.directory):
        path.unlink()
    if run.best:
        run.directory.mkdir(parents=True, exist_ok=True)
        save_best(run)
    else:
        (run.directory / BEST).unlink(missing_ok=True)


def stops(run: Run, times_per_epoch: int) -> set[int]:
    """Step counts at which something is due that often, and the last."""
    per_epoch, epochs = run.batches.per_epoch, run.settings.epochs
    due = {-(-n * per_epoch // times_per_epoch) for n in range(1, epochs * times_per_epoch)}
    return due | {run.total_steps}


def accurate_enough(run: Run) -> bool:
    target = run.settings.stop_at_accuracy
    return target is not None and best_accuracy(run.rows) >= target


def train_until(run: Run, stop: int, progress: Progress) -> None:
    started = time.perf_counter()
    run.model.train()
    while run.step < stop:
        train_step(run, *run.batches[run.step])
        progress.advance(run.step, run.tally)
        run.step += 1
    run.tally.means()  # waits until the device is done
    run.seconds += time.perf_counter() - started


def train_step(run: Run, images: Tensor, labels: Tensor) -> None:
    run.optimizer.zero_grad()
    with autocast(run):
        logits = run.model(images)
        loss = run.criterion(logits, labels)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    run.tally.add(loss, logits, labels)


def autocast(run: Run) -> torch.autocast:
    dtype = PRECISIONS[run.settings.precision]
    return torch.autocast(run.processes.device.type, dtype, enabled=dtype != torch.float32)


def evaluate(run: Run, progress: Progress, log: MetricsLog | None) -> None:
    """Add a row; keep the weights if they are the best so far."""
    row = measure(run)
    run.add_row(row)
    progress.evaluated(row)
    if log is not None:
        log.append(row, getattr(run.optimizer, "diagnostics", dict)())
        if run.best["row"]["step"] == row.step:
            save_best(run)


def measure(run: Run) -> Row:
    train, test = run.tally.means(run.processes), test_means(run)
    steps, seconds = run.step, run.seconds
    if run.rows:
        steps, seconds = steps - run.rows[-1].step, seconds - run.rows[-1].seconds
    return Row(
        step=run.step,
        epoch=run.step / run.batches.per_epoch,
        seconds=run.seconds,
        lr=run.optimizer.param_groups[0]["lr"],
        train_loss=train.loss,
        train_accuracy=train.accuracy,
        test_loss=test.loss,
        test_accuracy=test.accuracy,
        images_per_second=steps * run.batches.batch_size / seconds,
    )


@torch.no_grad()
def test_means(run: Run) -> Means:
    run.processes.share_buffers(run.plain_model)
    run.plain_model.eval()
    tally = Tally(run.processes.device)
    for images, labels in evaluation_batches(run.dataset, run.processes):
        with autocast(run):
            logits = run.plain_model(images)
        # Not run.criterion: the test loss has no label smoothing, and K-FAC watches that object.
        tally.add(F.cross_entropy(logits.float(), labels), logits, labels)
    return tally.means(run.processes)


def save_latest(run: Run) -> None:
    state = run.state_dict()
    if run.processes.is_main:
        save_checkpoint(run.directory / LATEST, state)


def save_best(run: Run) -> None:
    settings = run.settings.model_dump()
    save_checkpoint(run.directory / BEST, {"settings": settings} | run.best)


@contextmanager
def reporting(run: Run) -> Iterator[tuple[Progress, MetricsLog | None]]:
    """Progress and metrics while the run lasts, and its picture however it ends."""
    is_main = run.processes.is_main
    progress = Progress(
        run.name, run.settings.epochs, run.batches.per_epoch, run.batches.batch_size, is_main
    )
    log = MetricsLog(run.directory, run.rows) if is_main else None
    try:
        yield progress, log
    finally:
        progress.close()
        if log is not None:
            log.close()
            draw_curves(run.directory / "curves.png", {run.name: run.rows})
