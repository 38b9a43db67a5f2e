"""Pictures of runs: loss and accuracy against epochs and against seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiment.metrics import Row
from experiment.whole_files import replacing

COLORS = ("#0b6fa4", "#d1651a", "#4d8b31", "#8a4f9e")


def draw_curves(path: Path, runs: Mapping[str, Sequence[Row]], target: float | None = None) -> None:
    """Write one picture of all runs; a dashed line marks the `target` accuracy."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (horizontal, label) in enumerate(
        [("epoch", "epochs"), ("seconds", "training seconds")]
    ):
        losses, accuracies = axes[0][column], axes[1][column]
        for color, (name, rows) in zip(COLORS, runs.items(), strict=False):
            x = [getattr(row, horizontal) for row in rows]
            losses.semilogy(x, [row.test_loss for row in rows], color=color, label=f"{name}, test")
            losses.semilogy(
                x, [row.train_loss for row in rows], ":", color=color, label=f"{name}, train"
            )
            accuracy = [100 * row.test_accuracy for row in rows]
            accuracies.plot(x, accuracy, ".-", color=color, label=name)
        if target is not None:
            accuracies.axhline(100 * target, color="gray", linestyle="--", linewidth=1)
        accuracies.set_xlabel(label)
        for axis in (losses, accuracies):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("test accuracy (%)")
    axes[0][0].legend(frameon=False)
    axes[1][0].legend(frameon=False, loc="lower right")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
