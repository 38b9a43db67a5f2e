import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import demo
import train_cifar
from experiment.equality import differences
from experiment.metrics import TIMES

SMALL = [
    "device=cpu",
    "data.limit=24",
    "data.batch_size=8",
    "epochs=2",
    "evaluations_per_epoch=2",
    "checkpoints_per_epoch=3",
]
OPTIMIZERS = {
    "sgd": ['optimizer={name="sgd", lr=0.1}'],
    "adamw": ['optimizer={name="adamw", lr=0.01}'],
    "kfac": ['optimizer={name="kfac", factor_update_period=2, inverse_update_period=3}'],
}


class Interruption(Exception):
    pass


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text('[optimizer]\nname = "sgd"\nlr = 0.1\n[schedule]\nname = "cosine"\n')
    return path


def run(config: Path, directory: Path, *arguments: str) -> int:
    return train_cifar.main([str(config), "--output-dir", str(directory), *SMALL, *arguments])


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    train_step = train_cifar.train.__globals__["train_step"]

    def interrupted(run: Any, *batch: torch.Tensor) -> None:
        if run.step == step:
            raise Interruption
        train_step(run, *batch)

    monkeypatch.setattr("cifar.training.train_step", interrupted)


def metrics(directory: Path) -> list[dict[str, str]]:
    """Without what the clock decides."""
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_in_the_middle_of_an_epoch_is_exact_to_the_bit(
    optimizer: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = OPTIMIZERS[optimizer]
    assert run(config, tmp_path / "whole", *overrides) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=4)
        with pytest.raises(Interruption):
            run(config, tmp_path / "parts", *overrides)
    checkpoint = torch.load(tmp_path / "parts" / "latest.pt", weights_only=True)
    assert checkpoint["step"] == 4
    assert run(config, tmp_path / "parts", *overrides, "--resume") == 0

    whole, parts = (
        torch.load(tmp_path / name / "latest.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["step"] == 6
    assert differences("run", whole, parts, TIMES) == []
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_run_writes_metrics_curves_tensorboard_and_checkpoints(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    assert run(config, directory, "data.limit=16", "epochs=1", "precision=bfloat16") == 0
    rows = metrics(directory)
    assert [(row["step"], row["epoch"]) for row in rows] == [("1", "0.5"), ("2", "1.0")]
    assert (directory / "curves.png").stat().st_size > 10_000
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("test_accuracy")] == [1, 2]
    best = torch.load(directory / "best.pt", weights_only=True)
    assert best["row"]["test_accuracy"] == max(float(row["test_accuracy"]) for row in rows)
    output = capsys.readouterr().out
    assert "resnet20 (269,722 parameters) on digits" in output
    assert "small epoch 1/1: " in output

    assert run(config, directory) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(config, directory, "optimizer.lr=0.2", "--resume") == 2
    assert "with other settings of data.limit, optimizer.lr, precision" in capsys.readouterr().err


def test_a_run_stops_at_the_accuracy_it_is_asked_for(config: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "run", "stop_at_accuracy=0.001", "data.limit=450") == 0
    assert len(metrics(tmp_path / "run")) < 4


@pytest.mark.parametrize(
    "optimizer",
    [
        '{name="sgd", lr=0.1}',
        # Without sampled labels, which are different in every process.
        '{name="kfac", lr=0.01, fisher="empirical", max_factor_dim=600, factor_update_period=1}',
    ],
    ids=["sgd", "kfac"],
)
def test_two_processes_take_the_steps_of_one(config: Path, tmp_path: Path, optimizer: str) -> None:
    # VGG-11 has no batch statistics, which differ between a batch and its halves.
    arguments = ["model.name=vgg11", "epochs=1", "checkpoints_per_epoch=0"]
    arguments.append(f"optimizer={optimizer}")
    assert run(config, tmp_path / "one", *arguments) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [train_cifar.__file__, str(config), "--output-dir", str(tmp_path / "two")]
    subprocess.run([*command, *SMALL, *arguments], check=True, capture_output=True, timeout=120)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 2
    for row, other in zip(one, two, strict=True):
        for key, value in row.items():
            assert float(value) == pytest.approx(float(other[key]), rel=1e-4)


def test_wrong_settings_end_with_status_2_and_no_traceback(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "run", "optimizer.lrr=1") == 2
    assert capsys.readouterr().err == (
        "override optimizer.lrr=1: optimizer.lrr is not a setting of sgd; "
        "did you mean optimizer.lr?\n"
    )


def test_help_shows_examples_configs_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        train_cifar.main(["--help"])
    output = capsys.readouterr().out
    for part in ("examples:", "--resume", "kfac.toml", "optimizer.inverse_update_period"):
        assert part in output


def test_resume_does_not_swallow_an_override(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_cifar.main(["some.toml", "--resume", "epochs=3"])
    assert "put a bare --resume last" in capsys.readouterr().err


def test_the_demo_shows_both_optimizers_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["device=cpu", "epochs=1", "evaluations_per_epoch=1"]
    arguments += ["data.limit=16", "data.batch_size=8", "--output-dir", str(tmp_path)]
    assert demo.main(arguments) == 0
    output = capsys.readouterr().out
    for part in ("K-FAC", "SGD", "epochs to 97% test accuracy", "milliseconds per step"):
        assert part in output
    for name in ("curves.png", "metrics.csv", "kfac/latest.pt", "sgd/latest.pt"):
        assert (tmp_path / name).exists()
