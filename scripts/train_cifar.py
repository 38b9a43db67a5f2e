"""Train an image classifier on the embedded digits, CIFAR-10 or CIFAR-100."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar.run import Run
from cifar.settings import CifarSettings
from cifar.training import train
from experiment.checkpoints import LATEST, load_checkpoint
from experiment.errors import RunError
from experiment.processes import join_processes
from experiment.settings import load_settings
from experiment.settings_schema import describe_settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "cifar"

EXAMPLES = """\
examples:
  train_cifar.py configs/cifar/kfac.toml
  train_cifar.py configs/cifar/sgd.toml optimizer.lr=0.05 epochs=4 seed=1
  train_cifar.py configs/cifar/kfac.toml data.name=cifar10 model.name=resnet18 device=cuda
  train_cifar.py configs/cifar/kfac.toml --resume
  torchrun --nproc-per-node=2 scripts/train_cifar.py configs/cifar/sgd.toml

written to the output folder:
  metrics.csv   a row per evaluation       latest.pt  the state to --resume from
  curves.png    the same as a picture      best.pt    weights of the best test accuracy
  tensorboard/  the same for TensorBoard
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    try:
        run_training(options)
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; --resume continues from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def run_training(options: argparse.Namespace) -> None:
    settings = load_settings(CifarSettings, options.config, options.overrides)
    directory, checkpoint = choose_paths(options)
    state = load_checkpoint(checkpoint) if checkpoint else None
    with join_processes(settings.device) as processes:
        run = Run(settings, processes, directory, options.config.stem)
        if checkpoint and state is not None:
            run.load_state_dict(state, checkpoint)
        if processes.is_main:
            if options.resume is not None and checkpoint is None:
                print(f"No checkpoint in {directory} yet: from the first step.")
            print(run.describe(), flush=True)
        train(run)


def choose_paths(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The output folder, and the checkpoint to continue from.

    A run that was killed before its first checkpoint is resumed like any other: anew.
    """
    directory: Path = options.output_dir or Path("runs", options.config.stem)
    if options.resume:
        given = Path(options.resume)
        checkpoint = given / LATEST if given.is_dir() else given
        return options.output_dir or checkpoint.parent, checkpoint
    latest = directory / LATEST
    if options.resume is not None:
        return directory, latest if latest.exists() else None
    if latest.exists() and not options.overwrite:
        raise RunError(
            f"{directory} holds a run already: continue it with --resume, replace it with "
            f"--overwrite, or choose another --output-dir."
        )
    return directory, None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=epilog(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", type=Path, help="TOML file with settings")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="setting to use instead of the file's")
    add("--output-dir", metavar="DIR", type=Path, help="default: runs/ and the name of CONFIG")
    add(
        "--resume",
        metavar="PATH",
        nargs="?",
        const="",
        type=checkpoint_path,
        help="continue from a checkpoint or a run's folder; without PATH from the output folder, "
        "or anew if it has no checkpoint yet",
    )
    add("--overwrite", action="store_true", help="replace the run in the output folder")
    return parser


def checkpoint_path(text: str) -> str:
    if "=" in text or text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"{text!r} is no checkpoint; put a bare --resume last")
    return text


def epilog() -> str:
    configs = "\n".join(
        f"  {path.name:<22}{title(path)}" for path in sorted(CONFIGS.glob("*.toml"))
    )
    settings = "\n".join(describe_settings(CifarSettings))
    return f"{EXAMPLES}\nconfigs in configs/cifar/:\n{configs}\n\nsettings:\n{settings}"


def title(config: Path) -> str:
    """The comment in the first line."""
    return config.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


if __name__ == "__main__":
    sys.exit(main())
