import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import benchmark_training
import kfac
from training import planning, running
from training.contenders import CONTENDERS, Entry, Trainer, hidden_matrices
from training.curves import contact_sheet, draw_curves
from training.data import (
    BOUNDARY_WEIGHT,
    Batches,
    Data,
    Examples,
    draw_poisson,
    draw_waveforms,
    windows,
)
from training.models import ByteModel, Poisson, curves_autoencoder
from training.planning import (
    Choice,
    Race,
    Runner,
    best_rate,
    fewest_steps,
    outwards,
    run_races,
    stored_races,
)
from training.report import (
    comparison_figures,
    comparison_table,
    comparisons,
    standings,
    table,
    tuning_table,
)
from training.results import Evaluation, Record, Results
from training.running import Run, carry_out
from training.targets import BestOf, Target
from training.tasks import TASKS, Task

CPU = torch.device("cpu")


def line() -> Data:
    """A line to be fitted."""
    inputs = torch.linspace(-1, 1, 12)[:, None]
    examples = Examples(inputs, 2 * inputs)
    return Data(examples, examples)


TINY = Task(
    "a line", line, lambda: nn.Linear(1, 1), nn.MSELoss, 4, Target("loss", 1e-3), 200, 2,
    learning_rates={"SGD": (0.001, 0.1), "AdamW": (0.01, 0.1)},
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    return TINY


@pytest.fixture
def carried_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are carried out and not found."""
    names: list[str] = []

    def counted(run: Run, task: Task, configuration: dict[str, object], *rest: object) -> Record:
        text = "{optimizer} {learning_rate} {purpose}".format(**configuration)
        names.append(text.replace("timed", str(configuration["seed"])))
        return carry_out(run, task, configuration, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "carry_out", counted)
    return names


def record(
    losses: list[float],
    lr: float | None = 0.1,
    seed: int = 0,
    outcome: str = "steps",
    purpose: str = "timed",
) -> Record:
    """One evaluation a step, one step in two seconds."""
    evaluations = tuple(Evaluation(n, 2.0 * n, loss) for n, loss in enumerate(losses))
    configuration = {
        "task": "tiny", "optimizer": "SGD", "learning_rate": lr, "seed": seed, "stop": None,
        "package": "torch", "purpose": purpose,
    }  # fmt: skip
    steps = len(losses) - 1
    return Record(configuration, evaluations, outcome, steps, 2.0 * steps)


# --- tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TASKS if name != "curves"])
def test_every_task_can_be_trained(name: str) -> None:
    check_that_it_trains(TASKS[name], TASKS[name].data())


def test_curves_can_be_trained() -> None:
    images = draw_curves(32, 0)
    check_that_it_trains(TASKS["curves"], Data(Examples(images, images), Examples(images, images)))


def check_that_it_trains(task: Task, data: Data) -> None:
    """Two steps of K-FAC on a few of the examples; the loss of a batch is that of its examples."""
    train, evaluated = (Examples(*(part[:24] for part in examples)) for examples in data)
    small = replace(task, data=lambda: Data(train, evaluated), batch_size=8, max_steps=2)
    run = Run(small, "K-FAC, default", None, 0, CPU)
    result = carry_out(run, small, {}, None, math.inf)
    assert result.outcome == "steps"
    assert len(result.evaluations) == 2
    assert (result.evaluations[0].accuracy is None) == train.targets.is_floating_point()
    assert all(math.isfinite(evaluation.loss) for evaluation in result.evaluations)


def test_grids_have_five_learning_rates_at_least() -> None:
    grids = [contender.learning_rates for contender in CONTENDERS.values()]
    grids += [grid for task in TASKS.values() for grid in task.learning_rates.values()]
    assert {len(grid) for grid in grids if grid} == {6}
    assert all(list(grid) == sorted(set(grid)) for grid in grids)


def test_the_loss_of_an_autoencoder_is_summed_over_pixels() -> None:
    logits, images = torch.randn(5, 64), torch.rand(5, 64)
    expected = nn.BCEWithLogitsLoss(reduction="sum")(logits, images) / 5
    assert torch.allclose(TASKS["digits"].criterion()(logits, images), expected)


def test_a_sparse_start_has_fifteen_incoming_weights() -> None:
    for layer in curves_autoencoder():
        if isinstance(layer, nn.Linear):
            incoming = (layer.weight != 0).sum(1)
            assert torch.equal(incoming, torch.full_like(incoming, min(15, layer.in_features)))


# --- data --------------------------------------------------------------------------------------


def test_curves_are_the_same_for_a_seed_however_many_are_drawn() -> None:
    images = draw_curves(6, 3)
    assert torch.equal(images, draw_curves(6, 3))
    assert not torch.equal(images, draw_curves(6, 4))
    assert images.shape == (6, 784)
    assert 0 <= images.min() < images.max() <= 1


def test_curves_stay_off_the_edge() -> None:
    images = draw_curves(500, 0).view(-1, 28, 28)
    edges = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]])
    assert edges.max() < 0.1
    assert images.flatten(1).max(1).values.median() == 1


def test_a_contact_sheet_is_drawn(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "new" / "curves.png", draw_curves(4, 0), 2, 2)
    assert (tmp_path / "new" / "curves.png").stat().st_size > 0


def test_waveforms_are_the_same_for_a_seed() -> None:
    (waves, labels), (others, _) = draw_waveforms(50, 0), draw_waveforms(50, 1)
    assert torch.equal(waves, draw_waveforms(50, 0)[0])
    assert not torch.equal(waves, others)
    assert waves.shape == (50, 1, 128)
    assert labels.unique().numel() == 8


def test_every_byte_is_to_be_predicted_from_those_before_it() -> None:
    inputs, targets = windows(torch.arange(10), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(targets, inputs + 1)


def test_the_transformer_does_not_look_ahead() -> None:
    model = ByteModel(length=6)
    x = torch.randint(256, (1, 6))
    changed = x.clone()
    changed[0, 4] += 1
    assert torch.allclose(model(x)[:4], model(changed % 256)[:4], atol=1e-6)


def test_points_on_the_boundary_say_what_u_is_there() -> None:
    points, values = draw_poisson(100, 0)
    position, inside = points[:, :2], points[:, 2] > 0
    assert inside.sum() == 80
    on_edge = ((position == 0) | (position == 1)).any(1)
    assert torch.equal(on_edge, ~inside)
    u = (2 * torch.pi * position).sin().prod(1) + position.prod(1)
    assert torch.allclose(values[~inside, 0], BOUNDARY_WEIGHT * u[~inside])


def test_the_laplacian_is_that_of_autograd() -> None:
    model = Poisson((2, 7, 5, 1)).double()
    points = torch.rand(4, 2, dtype=torch.float64)
    jets = model.jets(points)

    def u(point: Tensor) -> Tensor:
        return model.jets(point[None])[0, 0, 0]

    for point, jet in zip(points, jets, strict=True):
        gradient = torch.autograd.functional.jacobian(u, point)
        hessian = torch.autograd.functional.hessian(u, point)
        assert torch.allclose(jet[1:3, 0], gradient)
        assert torch.allclose(jet[3, 0], hessian.trace())
    inside = torch.cat([points, torch.ones(4, 1).double()], 1)
    assert torch.allclose(model(inside), -jets[:, 3])


# --- runs --------------------------------------------------------------------------------------


def test_optimizers_start_alike_and_see_the_same_batches() -> None:
    runs = [Run(TINY, name, lr, 5, CPU) for name, lr in [("SGD", 0.1), ("K-FAC, default", None)]]
    one, other = (run.model.state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for _ in range(7):
        for run in runs:
            run.train_step()
    batches = [[run.batches[step] for step in range(7)] for run in runs]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*batches, strict=True))
    assert not torch.equal(one["weight"], Run(TINY, "SGD", 0.1, 6, CPU).model.weight)


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own() -> None:
    examples = line().train
    batches = Batches(examples, 4, seed=0)
    epochs = [torch.cat([batches[3 * epoch + n][0] for n in range(3)]) for epoch in range(2)]
    assert all(torch.equal(epoch.sort(0).values, examples.inputs) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(batches[1][0], epochs[0][4:8])  # any step, in any order


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that moves by so much between two looks."""
    times: Iterator[float] = iter(seconds * n for n in range(10_000))
    return lambda: next(times)


def test_the_clock_counts_steps_and_stops_at_the_target() -> None:
    run = Run(TINY, "SGD", 0.1, 0, CPU, ticking(0.5))
    result = carry_out(run, TINY, {}, TINY.target, math.inf)  # type: ignore[arg-type]
    assert result.outcome == "target"
    assert [evaluation.step for evaluation in result.evaluations] == [
        *range(0, result.steps + 1, 2)
    ]
    assert all(row.seconds == 0.5 * row.step for row in result.evaluations)
    assert [row.loss <= 1e-3 for row in result.evaluations].index(True) == result.steps // 2
    assert result.seconds_per_step == 0.5


@pytest.mark.parametrize(
    ("max_seconds", "steps", "outcome"), [(3.1, 7, "seconds"), (9, 9, "steps")]
)
def test_a_run_ends_with_its_budget(max_seconds: float, steps: int, outcome: str) -> None:
    task = replace(TINY, max_steps=9)
    run = Run(task, "SGD", 1e-6, 0, CPU, ticking(0.5))
    result = carry_out(run, task, {}, Target("loss", 0), max_seconds)
    assert (result.steps, result.outcome) == (steps, outcome)
    assert result.evaluations[-1].step == steps  # also between the regular ones


def test_a_run_that_is_behind_ends_at_the_limit() -> None:
    result = carry_out(Run(TINY, "SGD", 1e-6, 0, CPU), TINY, {}, TINY.target, math.inf, 6)  # type: ignore[arg-type]
    assert (result.steps, result.outcome) == (6, "behind")
    assert result.evaluations[-1].step == 6


def test_a_run_that_diverges_ends_there() -> None:
    run = Run(TINY, "SGD", 1e30, 0, CPU)
    result = carry_out(run, TINY, {}, Target("loss", 0), math.inf)
    assert result.outcome.startswith("diverged at step")
    assert all(math.isfinite(row.loss) for row in result.evaluations)


def test_a_run_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise RuntimeError("not invertible\nand more")

    run = Run(TINY, "SGD", 0.1, 0, CPU)
    monkeypatch.setattr(run.trainer, "step", failing)
    result = carry_out(run, TINY, {}, None, math.inf)
    assert result.outcome == "failed at step 0: RuntimeError: not invertible"


def test_evaluations_are_means_over_all_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Examples(torch.randn(7, 3), torch.randint(3, (7,)))
    whole = running.evaluate(nn.Identity(), nn.CrossEntropyLoss(), examples)
    monkeypatch.setattr(running, "CHUNK", 2)
    assert running.evaluate(nn.Identity(), nn.CrossEntropyLoss(), examples) == pytest.approx(whole)


# --- contenders --------------------------------------------------------------------------------


def test_an_optimizer_with_a_closure_evaluates_the_model_itself() -> None:
    model = nn.Linear(1, 1)
    inputs, targets = line().train
    losses = []

    def loss_of() -> Tensor:
        losses.append(nn.MSELoss()(model(inputs), targets))
        return losses[-1]

    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    first = Trainer(optimizer, with_closure=True).step(loss_of)
    assert first.item() == losses[0].item()
    assert len(losses) > 1
    assert losses[-1] < losses[0]


def test_the_automatic_mode_is_run_as_soon_as_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Automatic(torch.optim.SGD):
        def __init__(self, model: nn.Module, **settings: object) -> None:
            given.update(settings)
            super().__init__(model.parameters())

    given: dict[str, object] = {}
    contender = CONTENDERS["K-FAC, auto"]
    monkeypatch.delattr(kfac, "LevenbergMarquardt", raising=False)
    assert "has no LevenbergMarquardt" in str(contender.reason_to_skip(nn.Linear(1, 1)))
    monkeypatch.setattr(kfac, "LevenbergMarquardt", lambda: "damping", raising=False)
    monkeypatch.setattr(kfac, "KFAC", Automatic)
    assert contender.reason_to_skip(nn.Linear(1, 1)) is None
    criterion = nn.MSELoss()
    trainer = contender.build(Entry(nn.Linear(1, 1), criterion, None, 7))
    assert trainer.with_closure
    assert given == {
        "lr": "auto", "momentum": "auto", "damping": "damping", "criterion": criterion, "seed": 7
    }  # fmt: skip


def test_muon_takes_matrices_between_hidden_units() -> None:
    hidden, others = hidden_matrices(curves_autoencoder())
    assert [tuple(weight.shape) for weight in hidden][:2] == [(200, 400), (100, 200)]
    assert len(hidden) == 10
    assert len(others) == 14
    reason = CONTENDERS["Muon"].unsuitable(TASKS["waves"].model())
    assert "convolutions" in str(reason)
    assert CONTENDERS["Muon"].unsuitable(ByteModel()) is None


# --- plans and reports -------------------------------------------------------------------------


def test_only_runs_that_are_missing_are_carried_out(
    tmp_path: Path, tiny: Task, carried_out: list[str]
) -> None:
    results = Results(tmp_path)
    choice = Choice(["tiny"], ["SGD", "AdamW"], [0, 1])
    (race,) = run_races(choice, results)
    assert carried_out == [
        "SGD 0.001 tuning", "SGD 0.1 tuning", "SGD 0.1 0", "SGD 0.1 1",
        "AdamW 0.01 tuning", "AdamW 0.1 tuning", "AdamW 0.1 0", "AdamW 0.1 1",
    ]  # fmt: skip
    carried_out.clear()
    assert run_races(choice, results) == [race]
    assert carried_out == []
    next(tmp_path.glob("tiny_sgd_lr0.1_timed_seed1_*")).unlink()
    run_races(choice, results)
    assert carried_out == ["SGD 0.1 1"]
    assert not list(tmp_path.glob(".*"))


def test_seconds_and_threads_do_not_decide_the_tuning(
    tmp_path: Path, tiny: Task, carried_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path)
    choice = Choice(["tiny"], ["SGD"], [0])
    run_races(choice, results)
    for record in results:
        timed = record.configuration["purpose"] == "timed"
        names = {"threads", "device", "max_seconds"} & set(record.configuration)
        assert len(names) == (3 if timed else 0)
    carried_out.clear()
    run_races(replace(choice, budget_seconds=50.0), results)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    run_races(choice, results)
    assert carried_out == ["SGD 0.1 0", "SGD 0.1 0"]


def test_a_tuning_run_has_all_the_seconds_that_it_needs(tmp_path: Path, tiny: Task) -> None:
    choice = Choice(["tiny"], ["SGD"], [0], budget_seconds=1e-9)
    (race,) = run_races(choice, Results(tmp_path))
    assert [r.outcome for r in race.tuning["SGD"]] == ["steps", "target"]
    assert [r.outcome for r in race.timed["SGD"]] == ["seconds"]


def test_a_grid_is_walked_from_the_middle() -> None:
    assert outwards([1, 2, 3, 4, 5, 6]) == [3, 4, 2, 5, 1, 6]
    assert outwards([5, 3, 1, 1]) == [3, 1, 5]
    assert outwards([7]) == [7]


GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 0.9)


@pytest.mark.parametrize("contender", ["SGD", "AdamW", "K-FAC"])
@pytest.mark.parametrize("target", [1e-3, 1e-1, 0.0])
def test_pruning_changes_neither_winner_nor_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contender: str, target: float
) -> None:
    task = replace(TINY, target=Target("loss", target), max_steps=75)
    monkeypatch.setitem(TASKS, "tiny", task)
    choice = Choice(["tiny"], [contender], [0], GRID)
    (race,) = run_races(choice, Results(tmp_path), tune_only=True)
    assert race.timed == {}
    pruned = race.tuning[contender]
    whole = [
        carry_out(
            Run(task, contender, rate, 0, CPU), task, {"learning_rate": rate}, race.target, math.inf
        )
        for rate in outwards(GRID)
    ]
    assert best_rate(pruned, race.target) == best_rate(whole, race.target)
    assert fewest_steps(pruned, race.target) == fewest_steps(whole, race.target)
    assert any(r.outcome == "behind" for r in pruned) == (target > 0)
    for shorter, longer in zip(pruned, whole, strict=True):
        losses = [e.loss for e in shorter.evaluations]
        assert losses == [e.loss for e in longer.evaluations][: len(losses)]


def test_a_record_that_is_behind_is_taken_up_to_its_steps(
    tmp_path: Path, tiny: Task, carried_out: list[str]
) -> None:
    results = Results(tmp_path)
    runner = Runner("tiny", tiny, Choice(["tiny"], ["SGD"], [0]), results)
    target = runner.target()

    def outcome(limit: int | None) -> tuple[str, int]:
        found = runner.tuning_run("SGD", 0.001, target, limit)
        return found.outcome, len(carried_out)

    assert outcome(20) == ("behind", 1)
    assert outcome(20) == outcome(8) == ("behind", 1)
    assert outcome(22) == ("behind", 2)
    assert outcome(None) == ("steps", 3)
    assert outcome(8) == ("steps", 3)
    assert len(list(results)) == 1


def test_a_longer_run_replaces_one_that_is_behind_no_more(
    tmp_path: Path, tiny: Task, carried_out: list[str]
) -> None:
    results = Results(tmp_path)
    choice = Choice(["tiny"], ["SGD"], [0], GRID)
    (race,) = run_races(choice, results, tune_only=True)
    behind = [r.learning_rate for r in race.tuning["SGD"] if r.outcome == "behind"]
    carried_out.clear()
    (alone,) = run_races(replace(choice, learning_rates=behind[:1]), results, tune_only=True)
    assert carried_out == [f"SGD {behind[0]} tuning"]
    assert [r.outcome for r in alone.tuning["SGD"]] == ["target"]
    (again,) = run_races(choice, results, tune_only=True)
    assert len(carried_out) == 1
    assert best_rate(again.tuning["SGD"], again.target) == best_rate(
        race.tuning["SGD"], race.target
    )


def test_a_yardstick_is_run_whole_and_before_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried_out: list[str]
) -> None:
    task = replace(TINY, target=BestOf("AdamW", 6), max_steps=10)
    monkeypatch.setitem(TASKS, "tiny", task)
    results = Results(tmp_path)
    choice = Choice(["tiny"], ["SGD", "AdamW"], [0])
    (race,) = run_races(choice, results)
    assert carried_out == [
        "AdamW 0.01 tuning", "AdamW 0.1 tuning", "SGD 0.001 tuning", "SGD 0.1 tuning",
        "SGD 0.1 0", "AdamW 0.1 0",
    ]  # fmt: skip
    assert [(r.outcome, r.steps) for r in race.tuning["AdamW"]] == [("steps", 10)] * 2
    assert [(r.outcome, r.steps) for r in race.timed["AdamW"]] == [("target", 6)]
    within = [e.loss for r in race.tuning["AdamW"] for e in r.evaluations if e.step <= 6]
    assert race.target == Target("loss", min(within))
    assert stored_races(choice, results) == [race]
    for path in tmp_path.glob("tiny_adamw_*_tuning_*"):
        path.unlink()
    assert stored_races(choice, results) == []


def test_a_stored_record_is_what_was_measured(tmp_path: Path) -> None:
    results = Results(tmp_path)
    measured = record([3.0, 1.0], None)
    results.add(measured)
    assert results.find(measured.configuration) == measured
    assert list(results) == [measured]
    assert results.find({**measured.configuration, "package": "torch 3"}) is None


def test_the_best_rate_is_the_first_at_the_target() -> None:
    slow, fast = record([5, 2, 0.5], 0.1), record([5, 1, 2], 0.2)
    assert best_rate([slow, fast], Target("loss", 1)) == 0.2
    assert best_rate([slow, fast], Target("loss", 0.1)) == 0.1  # reached by neither
    assert best_rate([], Target("loss", 1)) is None


def test_a_rate_that_needs_as_many_steps_does_not_win() -> None:
    first, second = record([5, 1], 0.1), record([5, 0.5], 0.2)
    assert best_rate([first, second], Target("loss", 1)) == 0.1


def test_the_table_shows_medians_and_what_was_not_reached(tiny: Task) -> None:
    tuning = [
        record([9, 5, 5], 0.01, outcome="behind", purpose="tuning"),
        record([9, 1, 1], 0.1, purpose="tuning"),
        record([9], 1.0, outcome="diverged at step 1", purpose="tuning"),
    ]
    timed = [record([9, 1, 1]), record([9, 5, 1], seed=1), record([9, 5, 2], seed=2)]
    race = Race("tiny", Target("loss", 1), {"SGD": tuning}, {"SGD": timed}, {"SOAP": "missing"})
    lines = table(race, "a line").splitlines()
    row = "| SGD | 0.1 | 3 | 2 (1 to not reached) | 4.0 (2.0 to not reached) | 1 | 2000.0 |"
    assert row in lines
    assert "- SOAP: missing" in lines
    assert lines[lines.index("Ended early:") + 2 :] == ["- SGD, lr 1, tuning: diverged at step 1"]
    assert not any("edge" in line for line in lines)
    assert "| SGD | 0.1 | 1 |" in tuning_table(race, "a line").splitlines()
    edged = replace(race, tuning={"SGD": tuning[:2]})
    assert standings(edged)[0].at_edge
    assert "| SGD | 0.1\\* | 1 |" in tuning_table(edged, "a line").splitlines()


def timed_race(task: str, **steps: int | None) -> Race:
    """Contenders by their steps to the target; None for what does not get there."""
    records = {
        name.replace("_", ", ").replace("KFAC", "K-FAC"): [
            record([9] * (5 if count is None else count) + [9 if count is None else 1])
        ]
        for name, count in steps.items()
    }
    return Race(task, Target("loss", 1), timed=records)


def test_ratios_are_those_of_the_best_rival_on_each_task() -> None:
    races = [
        timed_race("a", SGD=8, AdamW=6, SOAP=1, KFAC_auto=3, KFAC_default=2),
        timed_race("b", SGD=8, AdamW=None, KFAC_auto=1),
        timed_race("c", SGD=8, KFAC_auto=None),
        timed_race("d", SGD=None, KFAC_auto=4),
        timed_race("e", SGD=None, KFAC_auto=None),
        timed_race("f", KFAC_auto=4),
    ]
    first_order, every, default = comparisons(races)
    assert (first_order.contender, first_order.rivals) == ("K-FAC, auto", ["SGD", "AdamW"])
    assert comparison_table(first_order).splitlines()[-6:] == [
        "| a | 2.00 (AdamW) | 2.00 (AdamW) |",
        "| b | 8.00 (SGD) | 8.00 (SGD) |",
        "| c | not reached | not reached |",
        "| d | reached by us alone | reached by us alone |",
        "| e | reached by neither | reached by neither |",
        "| geometric mean | 4.00 over 2 of 5 tasks | 4.00 over 2 of 5 tasks |",
    ]
    assert every.rivals == ["SGD", "AdamW", "SOAP"]
    assert str(every.tasks["a"]["steps"]) == "0.33 (SOAP)"
    assert comparison_table(default).splitlines()[-1] == "| geometric mean | 4.00 | 4.00 |"
    assert comparison_table(default).startswith("K-FAC, default: how many times as much SGD needs")
    figures = comparison_figures(first_order)
    assert figures["tasks"]["a"]["steps"] == {"rival": "AdamW", "rival_to_ours": 2.0}
    assert [figures["tasks"][task]["steps"]["rival_to_ours"] for task in "cde"] == [None] * 3
    assert figures["geometric_mean"] == pytest.approx({"steps": 4.0, "seconds": 4.0})
    assert figures["tasks_in_mean"] == {"steps": 2, "seconds": 2}


def test_the_same_comparison_is_shown_once() -> None:
    (comparison,) = comparisons([timed_race("a", SGD=8, KFAC_auto=1)])
    assert comparison.rivals == ["SGD"]
    assert comparisons([timed_race("a", SGD=8)]) == []


def test_steps_and_seconds_have_rivals_of_their_own() -> None:
    race = timed_race("a", SGD=8, AdamW=4, KFAC_auto=2)
    (slow,) = race.timed["AdamW"]
    evaluations = tuple(replace(e, seconds=100.0 * e.step) for e in slow.evaluations)
    race.timed["AdamW"] = [replace(slow, evaluations=evaluations)]
    ratios = comparisons([race])[0].tasks["a"]
    assert (str(ratios["steps"]), str(ratios["seconds"])) == ("2.00 (AdamW)", "4.00 (SGD)")


def test_the_report_of_stored_runs_is_that_of_the_runs(
    tmp_path: Path, tiny: Task, carried_out: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", "tiny", "--optimizers", "SGD", "K-FAC, default", "--seeds", "0", "1"]
    arguments += ["--output-dir", str(tmp_path)]
    assert benchmark_training.main(arguments) == 0
    figures = json.loads((tmp_path / "results.json").read_text())
    output = capsys.readouterr()
    assert "tiny: SGD, lr 0.1, tuning: target" in output.err
    assert "tiny: SGD, lr 0.1, seed 1: target" in output.err
    assert "K-FAC, default: how many times as much SGD needs" in output.out
    assert carried_out == [
        "SGD 0.001 tuning", "SGD 0.1 tuning", "SGD 0.1 0", "SGD 0.1 1",
        "K-FAC, default None 0", "K-FAC, default None 1",
    ]  # fmt: skip
    tuning = figures["tasks"]["tiny"]["contenders"]["SGD"]["tuning"]
    assert [row["outcome"] for row in tuning] == ["steps", "target"]
    (tmp_path / "tiny.png").unlink()
    assert benchmark_training.main([*arguments, "--report-only"]) == 0
    assert len(carried_out) == 6
    assert capsys.readouterr().out == output.out
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [stored[name] for name in ("tasks", "comparisons")] == [
        figures[name] for name in ("tasks", "comparisons")
    ]
    assert (tmp_path / "tiny.png").stat().st_size > 0


def test_tuning_alone_times_nothing(
    tmp_path: Path, tiny: Task, carried_out: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks", "tiny", "--optimizers", "SGD", "K-FAC, default"]
    arguments += ["--output-dir", str(tmp_path)]
    assert benchmark_training.main([*arguments, "--tune-only"]) == 0
    assert carried_out == ["SGD 0.001 tuning", "SGD 0.1 tuning"]
    output = capsys.readouterr().out
    assert "| SGD | 0.1\\* |" in output
    assert "K-FAC" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    carried_out.clear()
    assert benchmark_training.main([*arguments, "--seeds", "0"]) == 0
    assert carried_out == ["SGD 0.1 0", "K-FAC, default None 0"]
