"""Train ResNet-20 on the embedded digits with K-FAC and with SGD, and show both side by side.

    python scripts/demo.py                    # about three minutes on two CPU cores
    python scripts/demo.py seed=1 epochs=4    # any setting of train_cifar.py, for both

Writes curves.png and metrics.csv of both, and the checkpoints of each, to runs/demo/.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar.run import Run
from cifar.settings import CifarSettings
from cifar.training import train
from experiment.curves import draw_curves
from experiment.errors import RunError
from experiment.metrics import Row, first_reaching, write_table
from experiment.processes import join_processes
from experiment.settings import load_settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "cifar"
OPTIMIZERS = {"K-FAC": "kfac.toml", "SGD": "sgd.toml"}
TARGET = 0.97


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    try:
        runs = {
            name: train_one(name, CONFIGS / config, options) for name, config in OPTIMIZERS.items()
        }
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    write_table(options.output_dir / "metrics.csv", runs)
    draw_curves(options.output_dir / "curves.png", runs, TARGET)
    print(comparison(runs))
    print(f"\ncurves: {options.output_dir / 'curves.png'}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="setting for both")
    parser.add_argument("--output-dir", metavar="DIR", type=Path, default=Path("runs/demo"))
    return parser


def train_one(name: str, config: Path, options: argparse.Namespace) -> list[Row]:
    """The seed of the settings gives both the same initial weights and order of images."""
    settings = load_settings(CifarSettings, config, options.overrides)
    with join_processes(settings.device) as processes:
        run = Run(settings, processes, options.output_dir / config.stem, name)
        print(run.describe(), flush=True)
        return train(run)


def comparison(runs: Mapping[str, Sequence[Row]]) -> str:
    reached = {name: first_reaching(rows, TARGET) for name, rows in runs.items()}
    last = {name: rows[-1] for name, rows in runs.items()}
    table = {
        "": list(runs),
        f"epochs to {TARGET:.0%} test accuracy": [
            f"{row.epoch:.2f}" if row else "not reached" for row in reached.values()
        ],
        f"seconds to {TARGET:.0%} test accuracy": [
            f"{row.seconds:.1f}" if row else "not reached" for row in reached.values()
        ],
        "final test accuracy": [f"{row.test_accuracy:.1%}" for row in last.values()],
        "milliseconds per step": [f"{1000 * row.seconds / row.step:.0f}" for row in last.values()],
    }
    lines = (
        f"{title:<28}" + "".join(f"{cell:>13}" for cell in cells) for title, cells in table.items()
    )
    return "\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
