import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from experiment.checkpoints import load_checkpoint, save_checkpoint
from experiment.equality import differences
from experiment.errors import RunError
from experiment.metrics import Row, Tally, first_reaching, write_table
from experiment.processes import choose_device
from experiment.random_states import random_states, restore_random_states, seed_everything
from experiment.schedules import ConstantSchedule, CosineSchedule, StepSchedule, factor
from experiment.whole_files import replacing


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def row(step: int, accuracy: float) -> Row:
    return Row(step, step / 10, float(step), 0.1, 1.0, 0.5, 1.0, accuracy, 100.0)


def test_schedules() -> None:
    assert [factor(ConstantSchedule(), step, 2, 10) for step in (0, 19)] == [1, 1]
    cosine = [factor(CosineSchedule(), step, 2, 10) for step in (0, 10, 20)]
    assert cosine == pytest.approx([1, 0.5, 0])
    step = StepSchedule(milestones=[1.0, 1.5], gamma=0.1)
    assert [factor(step, n, 2, 10) for n in (9, 10, 15)] == pytest.approx([1, 0.1, 0.01])
    warmup = CosineSchedule(warmup_epochs=1.0)
    assert [factor(warmup, n, 2, 10) for n in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    seed_everything(0)
    draw()
    save_checkpoint(tmp_path / "latest.pt", {"optimizer": {}, "states": random_states()})
    expected = draw()
    seed_everything(1)
    restore_random_states(load_checkpoint(tmp_path / "latest.pt")["states"])
    assert draw() == expected


def test_a_crash_while_saving_leaves_the_checkpoint_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "latest.pt", {"optimizer": {}, "step": 1})
    with pytest.raises((AttributeError, TypeError, Exception), match="pickle"):
        save_checkpoint(tmp_path / "latest.pt", {"optimizer": {}, "step": lambda: None})
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == 1


def test_unusable_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"No checkpoint at .*latest\.pt; leave --resume out"):
        load_checkpoint(tmp_path / "latest.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(RunError, match=r"noise\.pt is damaged, or was not written by this version"):
        load_checkpoint(tmp_path / "noise.pt")
    save_checkpoint(tmp_path / "best.pt", {"model": {}})
    with pytest.raises(RunError, match=r"best\.pt holds no training state; resume from .*latest"):
        load_checkpoint(tmp_path / "best.pt")


def test_tally_weighs_batches_by_their_size() -> None:
    tally = Tally(torch.device("cpu"))
    logits = torch.eye(3)
    tally.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 2]))
    tally.add(torch.tensor(5.0), logits[:1], torch.tensor([2]))
    assert tally.means() == (2.0, 0.75)


def test_first_reaching() -> None:
    rows = [row(5, 0.9), row(10, 0.98), row(15, 0.95)]
    assert first_reaching(rows, 0.95) == rows[1]
    assert first_reaching(rows, 0.99) is None


def test_table_names_the_run_in_every_line(tmp_path: Path) -> None:
    write_table(tmp_path / "metrics.csv", {"K-FAC": [row(5, 0.9)], "SGD": [row(5, 0.5)]})
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], line["test_accuracy"]) for line in lines] == [
        ("K-FAC", "0.9"),
        ("SGD", "0.5"),
    ]


def test_devices_that_are_not_there_are_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RunError, match="device must be auto, cpu, cuda"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="device cuda is not available here"):
            choose_device("cuda")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        with replacing(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"old"
        assert path.read_bytes() == content
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": [1.0]}, {"a": [1.0]}, []),
        ({"a": [0.0]}, {"a": [-0.0]}, ["run.a.0"]),
        ({"a": float("nan")}, {"a": float("nan")}, []),
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}, ["run.a"]),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0)}, []),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0, dtype=torch.float64)}, ["run.a"]),
        ({"a": torch.tensor([1])}, {"a": 1}, ["run.a"]),
        ({"a": [1]}, {"a": [1, 2]}, ["run.a: 1 and 2 entries"]),
        ({"a": 1}, {"b": 1}, ["run: other keys"]),
        ({"seconds": 1.0, "step": 1}, {"seconds": 2.0, "step": 1}, []),
    ],
)
def test_differences_are_found_to_the_last_bit(
    one: object, other: object, found: list[str]
) -> None:
    assert differences("run", one, other, {"seconds"}) == found
