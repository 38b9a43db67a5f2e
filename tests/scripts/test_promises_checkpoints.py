"""Checkpoint files: damage and foreign files are refused, nothing in them is ever run."""

import copy
import io
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import train_cifar
from cifar.run import Run
from cifar.settings import CifarSettings
from cifar.training import train
from experiment.checkpoints import load_checkpoint, save_checkpoint
from experiment.equality import differences
from experiment.errors import RunError
from experiment.processes import Processes
from experiment.settings import load_settings

DAMAGED = "a damaged checkpoint of `scripts/train_cifar.py`"
FOREIGN = "a checkpoint of another run, or changed on purpose"
CODE = "code in a checkpoint"

CONFIG = """
device = "cpu"
epochs = 1
evaluations_per_epoch = 3
data = {limit = 24, batch_size = 8}
"""
OPTIMIZERS = {
    "sgd": '{name = "sgd", lr = 0.1}',
    "kfac": '{name = "kfac", max_factor_dim = 8, factor_update_period = 1}',
}


def write_small(path: Path) -> bytes:
    """A checkpoint of a few hundred numbers; its bytes."""
    tensors = {"a": torch.randn(20, 10), "b": torch.arange(50)}
    save_checkpoint(path, {"optimizer": tensors, "step": 3, "seconds": 1.5})
    return path.read_bytes()


def assert_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(RunError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert "resume" in message
    assert path.read_bytes() == data


@pytest.mark.promise(DAMAGED)
def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, generator = tmp_path / "latest.pt", random.Random(0)
    data = write_small(path)
    for position in generator.sample(range(8 * len(data)), 500):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert_refused(path, bytes(flipped))


def test_torch_itself_does_not_notice_flipped_bits(tmp_path: Path) -> None:
    data = bytearray(write_small(tmp_path / "latest.pt"))
    found = torch.load(io.BytesIO(data), weights_only=True)["optimizer"]["a"]
    data[data.index(found.numpy().tobytes())] ^= 1
    other = torch.load(io.BytesIO(data), weights_only=True)["optimizer"]["a"]
    assert not torch.equal(found, other)


@pytest.mark.promise(DAMAGED)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = write_small(tmp_path / "latest.pt")
    for length in {*range(0, len(data), 13), *range(len(data) - 100, len(data))}:
        assert_refused(tmp_path / "latest.pt", data[:length])


@pytest.mark.promise(DAMAGED)
def test_a_file_with_more_behind_it_is_refused(tmp_path: Path) -> None:
    data = write_small(tmp_path / "latest.pt")
    for more in (b"\0", b"\n", bytes(512), data):
        assert_refused(tmp_path / "latest.pt", data + more)


@pytest.mark.promise(DAMAGED)
def test_a_block_of_zeros_is_noticed(tmp_path: Path) -> None:
    data = write_small(tmp_path / "latest.pt")
    for size in (16, 512):
        for start in range(0, len(data), size):
            zeroed = data[:start] + bytes(len(data[start : start + size])) + data[start + size :]
            if zeroed != data:
                assert_refused(tmp_path / "latest.pt", zeroed)


@pytest.mark.promise(DAMAGED)
@pytest.mark.parametrize(
    "data",
    [b"", b"noise", b"step 3\n" * 100, pickle.dumps({"optimizer": {}}), bytes(4096)],
    ids=["empty", "short", "text", "pickle", "zeros"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    assert_refused(tmp_path / "latest.pt", data)


@pytest.mark.promise(DAMAGED)
def test_a_file_without_checksum_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"optimizer": {}, "step": 3}, buffer)
    assert_refused(tmp_path / "latest.pt", buffer.getvalue())


@pytest.mark.promise(DAMAGED)
def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    path.mkdir()
    with pytest.raises(RunError, match=r"Cannot read .*latest\.pt: Is a directory; resume from"):
        load_checkpoint(path)


def test_checkpoints_are_files_that_torch_reads(tmp_path: Path) -> None:
    write_small(tmp_path / "latest.pt")
    for mmap in (False, True):
        content = torch.load(tmp_path / "latest.pt", weights_only=True, mmap=mmap)
        assert differences("", content, load_checkpoint(tmp_path / "latest.pt")) == []


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.promise(CODE)
@pytest.mark.parametrize("kind", ["pickle", "torch", "torch, old format", "sealed", "sealed part"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "latest.pt", tmp_path / "made"
    payload = Payload(target)
    match kind:
        case "pickle":
            path.write_bytes(pickle.dumps(payload))
        case "sealed":
            save_checkpoint(path, payload)  # type: ignore[arg-type]
        case "sealed part":
            save_checkpoint(path, {"optimizer": {"state": payload}, "step": 3})
        case _:
            torch.save(payload, path, _use_new_zipfile_serialization=kind == "torch")
    assert_refused(path, path.read_bytes())
    assert not target.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()


def new_run(directory: Path, config: Path, *overrides: str) -> Run:
    settings = load_settings(CifarSettings, config, overrides)
    return Run(settings, Processes(torch.device("cpu")), directory, "small")


class Finished(NamedTuple):
    """A run that is over."""

    config: Path
    directory: Path

    @property
    def latest(self) -> Path:
        return self.directory / "latest.pt"

    def again(self, *overrides: str) -> Run:
        return new_run(self.directory, self.config, *overrides)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "small.toml").write_text(f"{CONFIG}optimizer = {OPTIMIZERS[request.param]}\n")
    run = Finished(folder / "small.toml", folder / "run")
    train(run.again())
    return run


def paths_to(content: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every entry of the dicts inside, and of those in lists."""
    if isinstance(content, list):
        for number, entry in enumerate(content):
            yield from paths_to(entry, (*at, number))
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*at, key)
            yield from paths_to(value, (*at, key))


def delete(parent: Any, key: Any) -> None:
    del parent[key]


def rename(parent: Any, key: Any) -> None:
    parent[f"{key}_"] = parent.pop(key)


def retype(parent: Any, key: Any) -> None:
    parent[key] = "text" if not isinstance(parent[key], str) else 0


def reshape(parent: Any, key: Any) -> None:
    parent[key] = torch.zeros(7, 7, dtype=parent[key].dtype)


def recast(parent: Any, key: Any) -> None:
    parent[key] = parent[key].to(torch.float16)


def damaged(state: Any, path: tuple[Any, ...], damage: Callable[[Any, Any], None]) -> Any:
    """A copy with damage at one place; what is elsewhere is shared."""
    state = parent = copy.copy(state)
    for key in path[:-1]:
        parent[key] = parent = copy.copy(parent[key])
    damage(parent, path[-1])
    return state


def drawn(paths: list[tuple[Any, ...]], count: int) -> list[tuple[Any, ...]]:
    return random.Random(0).sample(paths, count)


def assert_none_fits(run: Run, source: Path, states: Iterable[Any]) -> None:
    """Every state is refused, and `run` is as it was."""
    before = copy.deepcopy(run.state_dict())
    for state in states:
        with pytest.raises(RunError) as caught:
            run.load_state_dict(state, source)
        assert str(caught.value).startswith(f"{source} does not fit this run: ")
        assert str(caught.value).endswith("or leave --resume out to start anew.")
    assert differences("run", run.state_dict(), before) == []
    assert (run.step, run.scheduler.last_epoch, run.rows, run.best) == (0, 0, [], {})


# Nothing depends on settings that may change; an optimizer knows best what is in its state.
FREE = {("settings",), ("optimizer", "state"), ("optimizer", "kfac"), ("random_states",)}


@pytest.mark.promise(FOREIGN)
@pytest.mark.parametrize("damage", [delete, rename, retype])
def test_a_state_with_an_entry_of_its_own_kind_is_refused(
    finished: Finished, damage: Callable[[Any, Any], None]
) -> None:
    state = load_checkpoint(finished.latest)
    inner = [path for path in paths_to(state) if not any(path[: len(f)] == f for f in FREE)]
    paths = [(key,) for key in state] + [("optimizer", key) for key in state["optimizer"]]
    paths += [("random_states", 0, key) for key in state["random_states"][0]] + drawn(inner, 25)
    broken = (damaged(state, path, damage) for path in paths)
    assert_none_fits(finished.again(), finished.latest, broken)


@pytest.mark.promise(FOREIGN)
@pytest.mark.parametrize("damage", [reshape, recast])
def test_weights_of_another_shape_or_type_are_refused(
    finished: Finished, damage: Callable[[Any, Any], None]
) -> None:
    state = load_checkpoint(finished.latest)
    weights = [("model", key) for key in state["model"]]
    best = [("best", "model", key) for key in state["best"]["model"]]
    paths = [("tally",), ("random_states", 0, "torch"), *drawn(weights, 12), *drawn(best, 12)]
    broken = (damaged(state, path, damage) for path in paths)
    assert_none_fits(finished.again(), finished.latest, broken)


@pytest.mark.promise(FOREIGN)
@pytest.mark.parametrize("finished", ["kfac"], indirect=True)
def test_a_layer_that_does_not_fit_is_named_and_changes_nothing(finished: Finished) -> None:
    state = load_checkpoint(finished.latest)
    path = ("optimizer", "kfac", "layers", "0")
    run = finished.again()
    assert_none_fits(run, finished.latest, [damaged(state, path, delete)])
    with pytest.raises(RunError, match=r"lacks the layers 0\."):
        run.load_state_dict(damaged(state, path, delete), finished.latest)


@pytest.mark.promise(FOREIGN)
@pytest.mark.parametrize("finished", ["sgd"], indirect=True)
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("optimizer.lr=0.2", r"optimizer\.lr"),
        ("model.name=vgg11", r"model\.name"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    finished: Finished, override: str, key: str
) -> None:
    run = finished.again(override)
    with pytest.raises(RunError, match=rf"latest\.pt was made with other settings of {key}\. "):
        run.load_state_dict(load_checkpoint(finished.latest), finished.latest)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def swap(path: Path) -> None:
    shutil.copy(path.with_name("best.pt"), path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove_weight(path: Path) -> None:
    content = load_checkpoint(path)
    content["model"].popitem()
    save_checkpoint(path, content)


def remove_group(path: Path) -> None:
    content = load_checkpoint(path)
    content["optimizer"]["param_groups"] = []
    save_checkpoint(path, content)


@pytest.mark.promise(DAMAGED)
@pytest.mark.parametrize("finished", ["sgd"], indirect=True)
@pytest.mark.parametrize(
    "damage", [flip, truncate, swap, replace_by_folder, remove_weight, remove_group]
)
def test_resuming_from_damage_ends_with_one_line_and_leaves_the_folder_alone(
    finished: Finished,
    damage: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished.directory, directory)
    damage(directory / "latest.pt")
    before = snapshot(directory)
    assert train_cifar.main([str(finished.config), "--output-dir", str(directory), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(directory / "latest.pt") in error
    assert "resume" in error
    assert snapshot(directory) == before


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
