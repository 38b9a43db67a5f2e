"""`scripts/benchmark_step.py` composes mean steps from their classes, and leaves methods alone."""

import json
from argparse import ArgumentTypeError
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import benchmark_step
from kfac import KFAC
from step_cost.memory import allocated_at_peak
from step_cost.schedule import Cycle, Part, Periods, cycle, mean_step, parse_periods
from step_cost.stages import Clock, places, stage_timers
from step_cost.trainers import Trainer

QUICK = ["--steps", "2", "--warm-up", "1"]
pytestmark = pytest.mark.filterwarnings("ignore:.*profiler.*:UserWarning")


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "folder" / "figures.json"
    assert benchmark_step.main([*QUICK, *arguments, "--json", str(path)]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    folder = tmp_path_factory.mktemp("benchmark")
    plot = folder / "another" / "stages.png"
    workloads = ["--workloads", "tiny", "tiny-transformer", "--periods", "1/2", "4/8"]
    return run(folder, *workloads, "--plot", str(plot)), plot.read_bytes()


@pytest.mark.parametrize("name", ["tiny", "tiny-transformer"])
def test_the_mean_step_is_the_weighted_mean_of_its_classes(
    outcome: tuple[dict[str, Any], bytes], name: str
) -> None:
    workload = outcome[0]["workloads"][name]
    for row, share in zip(workload["periods"], (1.0, 0.25), strict=True):
        parts = {part["name"]: part for part in row["classes"]}
        assert parts["ordinary"]["frequency"] == 1 - share
        assert parts["factor"]["frequency"] == share
        assert 0 < parts["refresh"]["frequency"] <= 1
        mean = sum(part["frequency"] * part["milliseconds"] for part in parts.values())
        assert row["mean"] == pytest.approx(mean)
        assert row["longest"] >= parts["factor"]["milliseconds"]
        for baseline in ("SGD", "AdamW"):
            time = workload["milliseconds"][baseline]
            assert row["over"][baseline] == pytest.approx(mean / time)
            assert len(row["over_by_round"][baseline]) == 2


@pytest.mark.parametrize("name", ["tiny", "tiny-transformer"])
def test_every_stage_is_timed(outcome: tuple[dict[str, Any], bytes], name: str) -> None:
    workload = outcome[0]["workloads"][name]
    stages = workload["stages"]
    of_factor_steps = {"Fisher pass", "statistics A", "statistics G", "fold"}
    for key, seconds in stages.items():
        passes = {"forward", "backward", "update"}
        expected = passes | ({"precondition"} if key in ("ordinary", "factor") else set())
        expected |= of_factor_steps if key == "factor" else set()
        assert {stage for stage, time in seconds.items() if time > 0.0} >= expected
        assert not any(seconds[stage] for stage in {*of_factor_steps} - expected - {"fold"})
    for row in workload["periods"]:
        assert all(row["stages"][stage] > 0 for stage in of_factor_steps | {"refresh"})
        costs = row["layers"].values()
        assert all(time > 0 for cost in costs for s, time in cost.items() if s != "statistics S")
        together = sum(cost["statistics A"] for cost in costs)
        assert together == pytest.approx(row["stages"]["statistics A"], rel=0.5)


def test_memory_counts_what_is_held_and_what_a_step_adds(
    outcome: tuple[dict[str, Any], bytes],
) -> None:
    for workload in outcome[0]["workloads"].values():
        memory = workload["memory"]
        held = 3 * 4 * workload["parameters"]  # weights, momentum, gradients
        assert memory["SGD"] > held
        assert memory["AdamW"] > memory["SGD"]
        assert memory["factor"] > memory["ordinary"] > memory["SGD"] + memory["curvature"] / 2
        both = memory["SGD"] + memory["curvature"]
        assert memory["ratio"] == pytest.approx(memory["factor"] / both)


def test_figures_say_how_they_were_made(outcome: tuple[dict[str, Any], bytes]) -> None:
    figures = outcome[0]
    assert figures["torch"] == torch.__version__
    assert figures["threads"] == torch.get_num_threads()
    assert figures["seed"] == figures["options"]["seed"] == 0
    assert figures["options"]["periods"] == ["1/2", "4/8"]
    assert figures["hardware"]
    assert figures["command"].startswith("python ")


def test_the_plot_is_a_picture(outcome: tuple[dict[str, Any], bytes]) -> None:
    assert outcome[1].startswith(b"\x89PNG")


def test_tables_name_what_they_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--workloads", "tiny", "--periods", "2/4", "--layers", "2", "--fastest")
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split("  ")[0] for line in lines]
    for word in ("SGD", "AdamW", "K-FAC ordinary", "K-FAC factor", "2/4", "statistics A", "sum"):
        assert word in starts
    by_layer = starts.index("layer, ms per step at 2/4")
    assert len(starts[by_layer + 1 :]) == 2


@pytest.mark.parametrize("inverse", ["eigen", "ekfac"])
def test_settings_reach_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inverse: str
) -> None:
    made: list[Any] = []
    construct = KFAC.__init__

    @wraps(construct)  # the signature has the default periods
    def recording(self: KFAC, *args: Any, **settings: Any) -> None:
        made.append(settings)
        construct(self, *args, **settings)

    monkeypatch.setattr(KFAC, "__init__", recording)
    fisher = ["--fisher", "empirical", "--no-stagger", "--dtype", "bfloat16"]
    tiny = ["--workloads", "tiny", "--periods", "1/1"]
    figures = run(tmp_path, *tiny, *fisher, "--inverse", inverse)
    (settings,) = made
    assert (settings["fisher"], settings["inverse"]) == ("empirical", inverse)
    assert settings["stagger_refreshes"] is False
    stages = figures["workloads"]["tiny"]["stages"]["factor"]
    assert (stages["statistics S"] > 0) == (inverse == "ekfac")
    assert stages["Fisher pass"] == 0


def test_methods_are_put_back_even_after_an_error() -> None:
    before = [vars(place.owner)[place.method] for place in places()]
    assert len(before) > 20

    def fail() -> None:
        with stage_timers(Clock(lambda: None)):
            inside = [vars(place.owner)[place.method] for place in places()]
            assert all(a is not b for a, b in zip(inside, before, strict=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after = [vars(place.owner)[place.method] for place in places()]
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_a_stage_excludes_the_stages_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    clock = Clock(lambda: None)
    clock.enter("backward")
    clock.enter("statistics A", "layer")
    clock.leave()
    clock.leave()
    assert clock.seconds == {("backward", None): 5.0, ("statistics A", "layer"): 2.0}
    assert clock.by_stage()["backward"] == 5000.0


def test_timers_see_sgd_too() -> None:
    model = nn.Linear(3, 2)
    trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), None)
    clock = Clock(lambda: None)
    with stage_timers(clock):
        trainer.step((torch.randn(4, 3), torch.tensor([0, 1, 1, 0])))
    assert {stage for stage, _ in clock.seconds} == {"forward", "backward", "update"}


def test_a_cycle_follows_the_optimizers_own_schedule() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    optimizer = KFAC(model, criterion=nn.MSELoss())
    blocks = optimizer._engine.blocks
    steps = cycle(blocks, Periods(2, 8), staggered=True).steps
    assert [is_update for is_update, _ in steps] == [True, False] * 4
    turns = [refreshed for _, refreshed in steps]
    assert sorted(name for turn in turns for name in turn) == sorted(blocks.layers)
    assert sum(map(bool, turns)) == 4
    at_once = cycle(blocks, Periods(4, 2), staggered=False).steps
    assert [bool(refreshed) for _, refreshed in at_once] == [True, False, False, False]


def test_parts_add_up() -> None:
    a, b = frozenset("a"), frozenset("b")
    steps = Cycle(((True, a), (False, b), (False, frozenset()), (False, a)))
    parts = steps.parts(10.0, 30.0, {a: 4.0, b: 1.0})
    assert parts == [
        Part("ordinary", 0.75, 10.0),
        Part("factor", 0.25, 30.0),
        Part("refresh", 0.75, 3.0),
    ]
    assert mean_step(parts) == (34 + 11 + 10 + 14) / 4
    assert steps.longest(10.0, 30.0, {a: 4.0, b: 1.0}) == 34


def test_periods_are_read() -> None:
    assert parse_periods("10/100") == (10, 100)
    assert parse_periods("default") == (10, 100)
    for text in ("10", "0/1", "a/b", "1/-2"):
        with pytest.raises(ArgumentTypeError, match="two positive integers"):
            parse_periods(text)


def test_the_peak_is_not_the_sum() -> None:
    def function() -> None:
        for _ in range(3):
            torch.zeros(2**18)

    assert 2**20 <= allocated_at_peak(function, torch.device("cpu")) < 2 * 2**20
