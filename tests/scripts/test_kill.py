"""Runs that are killed: what is left is whole, and what is resumed ends the same."""

import csv
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kill_test
import train_cifar
from cifar.run import Run
from cifar.training import train_step
from experiment.checkpoints import load_checkpoint, save_checkpoint
from experiment.equality import differences
from experiment.whole_files import partial_files

KILLED = "`kill -9` of `scripts/train_cifar.py` at any moment"
CONFIG = """
device = "cpu"
epochs = 2
evaluations_per_epoch = 3
data = {limit = 24, batch_size = 8}
optimizer = {name = "sgd", lr = 0.1}
"""
KFAC = 'optimizer={name="kfac", max_factor_dim=64, factor_update_period=2}'


class Interruption(Exception):
    pass


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


def run(config: Path, directory: Path, *arguments: str) -> int:
    return train_cifar.main([str(config), "--output-dir", str(directory), *arguments])


def run_until(
    is_time: Callable[[Run], bool],
    monkeypatch: pytest.MonkeyPatch,
    config: Path,
    directory: Path,
    *arguments: str,
) -> None:
    """As `run`, to the first step before which it is time."""

    def interrupted(run: Run, images: torch.Tensor, labels: torch.Tensor) -> None:
        if is_time(run):
            raise Interruption
        train_step(run, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr("cifar.training.train_step", interrupted)
        patch.setattr("cifar.training.draw_curves", lambda *_: None)
        with pytest.raises(Interruption):
            run(config, directory, *arguments)


def steps(directory: Path) -> list[int]:
    with (directory / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.mark.promise(KILLED)
def test_a_run_that_is_killed_and_resumed_ends_as_without_interruption(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "--kills", "2", "--seed", "27"]
    arguments += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "result.json")]
    overrides = [KFAC, "data.batch_size=4", "checkpoints_per_epoch=6"]
    assert kill_test.main([*arguments, *overrides]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [kill["aim"] for kill in result["kills"]] == ["starting", "writing"]
    assert result["kills"][0]["step"] == 0
    assert 0 < result["kills"][1]["step"] < 12
    assert "resumed after 2 of 2 kills" in capsys.readouterr().out


@pytest.mark.promise(KILLED)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_kill_while_writing_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, generator = tmp_path / "latest.pt", random.Random(0)
    content = {"optimizer": torch.zeros(100_000), "step": 0}
    save_checkpoint(path, content)
    left = 0
    for _ in range(20):
        if (child := os.fork()) == 0:
            try:
                save_for_ever(path)
            finally:
                os._exit(1)
        while load_checkpoint(path)["step"] == content["step"]:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        left += len(partial_files(tmp_path))
        content = load_checkpoint(path)
        assert content["optimizer"].eq(content["step"]).all()
    assert left > 0


def save_for_ever(path: Path) -> None:
    step = load_checkpoint(path)["step"]
    while True:
        step += 1
        save_checkpoint(path, {"optimizer": torch.full((100_000,), float(step)), "step": step})


@pytest.mark.promise(KILLED)
def test_a_run_that_was_killed_before_its_first_checkpoint_is_resumed_anew(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "run"
    run_until(lambda run: run.step == 2, monkeypatch, config, directory)
    assert not (directory / "latest.pt").exists()
    assert run(config, directory, "--resume") == 0
    assert f"No checkpoint in {directory} yet: from the first step." in capsys.readouterr().out
    assert steps(directory) == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_is_asked_for_by_name_has_to_be_there(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "run", "--resume", str(tmp_path / "other")) == 2
    assert "No checkpoint at " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.promise(KILLED)
def test_all_files_go_back_to_the_checkpoint(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    run_until(lambda run: run.step == 5, monkeypatch, config, directory)
    state = load_checkpoint(directory / "latest.pt")
    assert state["step"] == 3
    assert steps(directory) == [1, 2, 3, 4, 5]
    with (directory / "metrics.csv").open("a") as file:
        file.write("6,2.0,0.1")
    (directory / ".latest.pt.partial").write_bytes(b"half")
    save_checkpoint(directory / "best.pt", {"row": {"step": 5}, "model": {}})

    run_until(lambda run: True, monkeypatch, config, directory, "--resume")
    assert steps(directory) == [1, 2, 3]
    assert partial_files(directory) == []
    best = torch.load(directory / "best.pt", weights_only=True)
    assert best["settings"] == state["settings"]
    del best["settings"]
    assert differences("best", best, state["best"]) == []
    assert run(config, directory, "--resume") == 0
    assert steps(directory) == [1, 2, 3, 4, 5, 6]
    tensorboard = kill_test.contents(directory)["tensorboard"]
    assert [step for step, _ in tensorboard["test_loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_keeps_nothing_of_the_one_before(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("latest.pt", "best.pt", ".best.pt.partial"):
        (directory / name).write_bytes(b"old")
    run_until(lambda run: True, monkeypatch, config, directory, "--overwrite")
    assert sorted(path.name for path in directory.iterdir()) == [
        "metrics.csv",
        "tensorboard",
    ]


def test_the_kill_test_says_what_is_wrong(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "--output-dir", str(tmp_path / "out")]
    assert kill_test.main([*arguments, "--kills", "0"]) == 2
    assert kill_test.main([*arguments, "epochs=1", "checkpoints_per_epoch=1"]) == 2
    error = capsys.readouterr().err
    assert "--kills must be at least 1" in error
    assert "at least two checkpoints" in error


def test_aims_are_drawn_in_the_order_of_the_run() -> None:
    aims = kill_test.draw_aims(50, 100, random.Random(0))
    assert aims == kill_test.draw_aims(50, 100, random.Random(0))
    assert [aim.stage for aim in aims[:2]] == ["starting", "training"]
    assert aims[0].checkpoints == aims[1].checkpoints == 0
    after = [aim.checkpoints for aim in aims]
    assert after == sorted(after)
    assert max(after) < 90
    assert {aim.stage for aim in aims} == {"starting", "training", "writing"}
