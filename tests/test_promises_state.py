"""State: what is saved resumes bit for bit, fits or is refused, and an error changes nothing."""

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import stored_states
import torch
from stored_states import SETTINGS, Run, batch, net, parameters
from torch import Tensor, nn

from kfac import KFAC, Cholesky, Eigen, LevenbergMarquardt, Preconditioner
from kfac.inverse import cholesky

State = dict[str, Any]
STEPS = 6


# --- resuming ----------------------------------------------------------------------------------


class Training:
    """A loop with all that has a state: dropout, a scheduler, maybe a gradient scaler."""

    def __init__(
        self,
        scaled: bool = False,
        fault: int = -1,
        harm: Sequence[float] = (math.inf,),
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.PReLU(), nn.Dropout(0.3), nn.Linear(5, 2)
        )  # fmt: skip
        self.criterion = nn.CrossEntropyLoss()
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=64.0, growth_interval=2, enabled=scaled
        )
        self.fault, self.harm = fault, harm  # a step whose loss is so many times too large
        periods: dict[str, Any] = {"factor_update_period": 2, "inverse_update_period": 3}
        self.is_automatic = "damping" in settings or settings.get("lr") == "auto"
        self.optimizer = KFAC(self.model, criterion=self.criterion, **periods | settings)
        self.scheduler = (
            None
            if settings.get("lr") == "auto"
            else torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.7)
        )

    def closure(self, step: int) -> Callable[[], Tensor]:
        x, y = batch(step)
        factors = iter(self.harm if step == self.fault else ())  # at the first looks at the batch

        def evaluate() -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = self.criterion(self.model(x), y) * next(factors, 1.0)
            self.scaler.scale(loss).backward()
            return loss

        return evaluate

    def train_step(self, step: int) -> None:
        if self.is_automatic:
            self.optimizer.step(self.closure(step))
        else:
            self.closure(step)()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.scheduler is not None:
            with warnings.catch_warnings():
                # Torch counts only steps that the scaler has not skipped.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step()`")
                self.scheduler.step()

    @property
    def parts(self) -> dict[str, Any]:
        found = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return found if self.scheduler is None else found | {"scheduler": self.scheduler}

    def everything(self) -> State:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return states | {
            "random": torch.get_rng_state(), "diagnostics": self.optimizer.diagnostics()
        }  # fmt: skip

    def resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit, NaN where NaN."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one.isnan(), other.isnan()), where
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), where
    elif isinstance(one, Mapping):
        assert list(one) == list(other) or set(one) == set(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, theirs, f"{where}/{i}")
    else:
        assert one == other or (one != one and other != other), where


def assert_resumes(
    start: Callable[[], Any],
    folder: Path,
    steps: int = STEPS,
    during: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
) -> list[State]:
    """Stop a run before every step, resume it in another one from a file, and compare each step.

    Returns:
        All that was known before every step.
    """

    def go(run: Any, step: int) -> None:
        with during(step):
            run.train_step(step)

    whole, known = start(), []
    for step in range(steps + 1):
        known.append(copy.deepcopy(whole.everything()))
        torch.save(known[-1], folder / f"{step}.pt")
        if step < steps:
            go(whole, step)
    whole.optimizer.remove_hooks()
    for stop in range(steps + 1):
        resumed = start()
        go(resumed, steps - 1)  # state of its own, which loading must replace
        resumed.resume(folder / f"{stop}.pt")
        assert_same(known[stop], resumed.everything(), f"loaded at {stop}")
        for step in range(stop, steps):
            go(resumed, step)
            assert_same(known[step + 1], resumed.everything(), f"stop {stop}, step {step}")
        resumed.optimizer.remove_hooks()
    return known


RESUMED: dict[str, dict[str, Any]] = {
    "empirical": {"fisher": "empirical"},
    "mc": {"fisher": "mc"},
    "type-2": {"fisher": "type-2"},
    "eigen": {"inverse": "eigen"},
    "ekfac": {"inverse": "ekfac"},
    "newton-schulz, each step": {"inverse": "newton-schulz", "inverse_update_period": 1},
    "inverse-free": {"inverse": "inverse-free"},
    "warm start, each step": {"inverse": Eigen(warm_start=True), "inverse_update_period": 1},
    "refreshes skipped": {"inverse_update_period": 1, "refresh_tolerance": 0.5},
    "burn-in": {"burn_in": 2},
    "graft": {"graft": "adam"},
    "fallback": {"fallback": "adamw", "skip": ["0"]},
    "a bad batch": {"fault": 2},
    "scaler": {"scaled": True, "fault": 2, "fisher": "empirical"},
}


@pytest.mark.promise("resuming")
@pytest.mark.promise("`torch.load(weights_only=True)`")
@pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")
@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_run_resumes_bit_for_bit_from_every_step(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    known = assert_resumes(lambda: Training(**settings), tmp_path, 5)
    if settings.get("scaled"):
        assert known[-1]["diagnostics"]["steps"] == 4  # one has overflowed


AUTOMATIC: dict[str, dict[str, Any]] = {
    "all": {"lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt(period=2)},
    "momentum": {"lr": 0.1, "momentum": "auto", "damping": 0.1},
    "searched": {"lr": "auto", "damping": LevenbergMarquardt(period=2, search_period=2)},
    "inverse-free": {
        "lr": "auto", "damping": LevenbergMarquardt(period=3), "inverse": "inverse-free",
    },
}  # fmt: skip


@pytest.mark.promise("resuming")
@pytest.mark.promise("`torch.load(weights_only=True)`")
@pytest.mark.parametrize("settings", AUTOMATIC.values(), ids=AUTOMATIC)
def test_automatic_steps_resume_bit_for_bit_from_every_step(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    assert_resumes(lambda: Training(**settings), tmp_path, 4)


UNDONE: dict[str, dict[str, Any]] = {
    "at once": {"fault": 1, "harm": (1, 1e6)},
    "by the next batch": {"fault": 2, "harm": (1e6,)},
}


@pytest.mark.promise("resuming")
@pytest.mark.parametrize("settings", UNDONE.values(), ids=UNDONE)
def test_automatic_steps_resume_after_a_step_was_undone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings | {"lr": "auto", "momentum": "auto"}
    rule = LevenbergMarquardt(initial=1.0)
    known = assert_resumes(lambda: Training(damping=rule, **settings), tmp_path, 4)
    rejected = [state["diagnostics"]["rejected_steps"] for state in known]
    fault = settings["fault"]
    assert rejected == [0] * (fault + 1) + [1] * (4 - fault)


class Branched:
    """A layer that first runs in a bad batch, when another has long had statistics."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"first": nn.Linear(3, 2), "second": nn.Linear(3, 2)})
        self.model.forward = lambda x, both: (  # type: ignore[assignment]
            self.model["first"](x) + (self.model["second"](x) if both else 0)
        )
        self.optimizer = KFAC(
            self.model, fisher="empirical", factor_update_period=3, inverse_update_period=3
        )

    def train_step(self, step: int) -> None:
        self.optimizer.zero_grad()
        x, _ = batch(step)
        x = x * math.nan if step == 3 else x
        self.model(x, both=step >= 3).square().mean().backward()
        self.optimizer.step()

    def everything(self) -> State:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "diagnostics": self.optimizer.diagnostics(),
        }

    def resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


@pytest.mark.promise("resuming")
def test_a_run_resumes_while_a_layer_waits_for_its_first_statistics(tmp_path: Path) -> None:
    known = assert_resumes(Branched, tmp_path)
    layers = [state["optimizer"]["kfac"]["layers"]["second"] for state in known]
    assert [layer["ready"] for layer in layers] == [False] * 5 + [True] * 2  # before step 6 is due


class Followed(Training):
    """Its layers are looked for again on the way, which makes the next step update the factors."""

    def train_step(self, step: int) -> None:
        super().train_step(step)
        if step == 2:
            self.optimizer.update_layers()


@pytest.mark.promise("resuming")
def test_a_run_resumes_after_its_layers_were_updated(tmp_path: Path) -> None:
    known = assert_resumes(lambda: Followed(factor_update_period=10), tmp_path)
    updates = [state["diagnostics"]["factor_updates"] for state in known]
    assert updates == [0, 1, 1, 1, 2, 2, 2]


def failing(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    return (torch.full_like(matrices, math.nan),), torch.ones(len(matrices), dtype=torch.bool)


@pytest.mark.promise("resuming")
def test_a_run_resumes_after_failed_refreshes_and_fails_at_the_same_step(
    tmp_path: Path,
) -> None:
    def start() -> Training:
        strategy = Cholesky(max_consecutive_failures=4)
        return Training(inverse=strategy, factor_update_period=1, inverse_update_period=1)

    @contextmanager
    def during(step: int) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if step >= 3:
                patch.setattr(cholesky, "inverse_by_cholesky", failing)
            yield

    known = assert_resumes(start, tmp_path, steps=6, during=during)
    assert known[-1]["diagnostics"]["failed_refreshes"] > 0
    for stop in (2, 5):
        run = start()
        run.resume(tmp_path / f"{stop}.pt")
        for step in range(stop, 6):
            with during(step):
                run.train_step(step)
        with during(6), pytest.raises(RuntimeError, match="could not be decomposed 4 times"):
            run.train_step(6)


SCRIPT = """
import sys, torch
from test_promises_state import Training
torch.set_num_threads(1)
run = Training(inverse="ekfac", graft="adam")
run.resume(sys.argv[1])
for step in range(3, 7):
    run.train_step(step)
torch.save(run.everything(), sys.argv[2])
"""


@pytest.mark.promise("resuming")
def test_a_run_resumes_in_a_new_process(tmp_path: Path) -> None:
    whole = Training(inverse="ekfac", graft="adam")
    for step in range(7):
        if step == 3:
            torch.save(whole.everything(), tmp_path / "half.pt")
        whole.train_step(step)
    files = [str(tmp_path / name) for name in ("half.pt", "whole.pt")]
    tests = Path(__file__).parent
    subprocess.run([sys.executable, "-c", SCRIPT, *files], cwd=tests, check=True)
    assert_same(whole.everything(), torch.load(files[1], weights_only=True))


# --- states that do not fit --------------------------------------------------------------------


Path_ = tuple[Any, ...]


def nodes(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every entry of nested dicts and lists, containers included, with the way to it."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, entry in items:
        yield (*path, key), entry
        if isinstance(entry, Mapping | list | tuple):
            yield from nodes(entry, (*path, key))


REMOVED = object()


def changed(state: Any, path: Path_, value: Any) -> Any:
    """A copy of a state in which one entry is another, or is removed."""
    key, *rest = path
    copied = dict(state) if isinstance(state, Mapping) else list(state)
    if rest:
        copied[key] = changed(state[key], tuple(rest), value)
    elif value is REMOVED:
        del copied[key]
    else:
        copied[key] = value
    return tuple(copied) if isinstance(state, tuple) else copied


def damages(value: Any) -> Iterator[tuple[str, Any]]:
    """What may become of an entry."""
    yield "removed", REMOVED
    yield "None", None
    yield "of another type", 1.5 if isinstance(value, str) else "x"
    if isinstance(value, Tensor):
        yield "misshapen", torch.zeros(*value.shape, 2)
        yield "a list", [value.tolist()]
        if value.is_floating_point():
            yield "NaN", torch.full_like(value, math.nan)
            yield "infinite", torch.full_like(value, math.inf)
            yield "of integers", value.long()
    elif isinstance(value, float):
        yield "NaN", math.nan
    elif type(value) is int:
        yield "negative", -1 - value
    elif isinstance(value, Mapping):
        yield "longer", {**value, "extra": torch.zeros(3)}
        yield "empty", {}
    elif isinstance(value, list | tuple):
        yield "longer", [*value, 0]


def is_legitimate(path: Path_, damage: str, value: Any) -> bool:
    """Whether an entry that is damaged so could have been saved."""
    name = path[-1]
    if value is None and damage == "None":
        return True
    if path[0] == "param_groups":
        if damage == "longer" and len(path) == 2:
            return True  # schedulers put settings of their own there
        if damage == "of integers" or (damage == "of another type" and value == "auto"):
            return True  # a number for lr or momentum
    if path[0] == "automatic" or "made_from" in path:
        may_be_none = {"damping", "preconditioner_damping", "losses", "made_from"}
        if damage == "None" and name in may_be_none:
            return True
    if damage in ("NaN", "negative") and ("figures" in path or name == "kl_clip_scale"):
        return True  # numbers of the last step, to be looked at
    # The fallback's own settings and counts have a meaning to it only.
    is_foreign = path[0] == "fallback" and ("optimizer" in path or "held" in path)
    return (damage == "negative" and (is_foreign or name == "seed")) or (
        isinstance(value, Mapping) and not value and damage == "empty"
    )


def names_in(path: Path_, names: list[str]) -> set[str]:
    """What a message about a damaged entry may call it."""
    top, key, number = (*path, None, None)[:3]
    if top == "param_groups":
        return {"parameter group", "param_groups"}
    if top == "fallback" or path == ("kfac",):
        return {"fallback", "kfac", "K-FAC"}
    if top == "kfac" and key == "layers" and number is not None:
        return {repr(number), f" {number}"}  # "lacks the layers 0, 2"
    parameter = key if top == "state" else number
    if top in ("state", "update") and type(parameter) is int:
        return {names[parameter], "the shapes of all parameters"}
    if key == "held":
        return {"held", "parameter"}
    return {str(key), str(top)}


DAMAGED: dict[str, dict[str, Any]] = SETTINGS | {
    "groups": {"fisher": "empirical", "kl_clip": None, "grouped": True},
    "burn-in": {"burn_in": 5, "fisher": "mc"},
}


def start(settings: dict[str, Any]) -> Run:
    settings = dict(settings)
    if not settings.pop("grouped", False):
        return Run(settings)
    model = net()
    torch.manual_seed(0)
    first, *rest = model.parameters()
    groups = [{"params": rest, "lr": torch.tensor(0.01)}, {"params": [first], "nesterov": True}]
    return Run(settings | {"params": groups}, model=model)


@pytest.mark.promise("a state that does not fit")
@pytest.mark.parametrize("settings", DAMAGED.values(), ids=DAMAGED)
def test_damage_to_any_entry_is_an_error_that_changes_nothing(settings: dict[str, Any]) -> None:
    saved_run, run, twin = start(settings), start(settings), start(settings)
    saved_run.train(0, 3)
    saved = saved_run.optimizer.state_dict()
    for other in (run, twin):
        other.train(0, 2)
    name_of = {parameter: name for name, parameter in run.model.named_parameters()}
    names = [name_of[p] for group in run.optimizer.param_groups for p in group["params"]]
    accepted, unnamed = [], []
    for path, value in nodes(saved):
        for damage, replacement in damages(value):
            if is_legitimate(path, damage, value):
                continue
            try:
                run.optimizer.load_state_dict(changed(saved, path, replacement))
            except ValueError as error:
                if not any(name in str(error) for name in names_in(path, names)):
                    unnamed.append((path, damage, str(error)))
            else:
                accepted.append((path, damage))
    assert accepted == []
    assert unnamed == []
    assert_same(run.optimizer.state_dict(), twin.optimizer.state_dict())
    for other in (run, twin):
        other.train(2, 5)
    assert_same(run.optimizer.state_dict(), twin.optimizer.state_dict())
    assert_same(parameters(run.model), parameters(twin.model))
    run.optimizer.load_state_dict(saved)  # what was damaged was a copy


def preconditioner(**settings: Any) -> tuple[nn.Module, Preconditioner, Callable[[int], None]]:
    torch.manual_seed(0)
    model, criterion = net(), nn.CrossEntropyLoss()
    engine = Preconditioner(model, criterion=criterion, inverse="ekfac", **settings)

    def step(number: int) -> None:
        model.zero_grad()
        x, y = batch(number)
        criterion(model(x), y).backward()
        engine.step()

    return model, engine, step


@pytest.mark.promise("a state that does not fit")
def test_damage_to_a_preconditioners_state_is_an_error_that_changes_nothing() -> None:
    (_, saved_engine, first), (model, engine, step), (its_model, twin, its_step) = (
        preconditioner() for _ in range(3)
    )
    first(0)
    saved = saved_engine.state_dict()
    step(1), its_step(1)
    for path, value in nodes(saved):
        for damage, replacement in damages(value):
            if not is_legitimate(("kfac", *path), damage, value):
                with pytest.raises(ValueError, match="state dict"):
                    engine.load_state_dict(changed(saved, path, replacement))
    assert_same(engine.state_dict(), twin.state_dict())
    step(2), its_step(2)
    assert_same(engine.state_dict(), twin.state_dict())
    assert_same([p.grad for p in model.parameters()], [p.grad for p in its_model.parameters()])


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "automatic steps": (SETTINGS["automatic"], {}, "is of automatic steps.*lr, momentum and damp"),
    "no automatic steps": ({}, SETTINGS["automatic"], "is not of automatic steps"),
    "a damping that adapts itself": (
        SETTINGS["automatic"], {"lr": "auto", "momentum": "auto"}, "damping .* saved damping",
    ),
    "a fallback": ({"fallback": "adamw"}, {}, "differ in fallback=: the state is of AdamW"),
    "no fallback": ({}, {"fallback": "adamw"}, "differ in fallback=.*has AdamW"),
    "a graft": ({"graft": "adam"}, {}, r"graft_average, graft_weight .*'0.weight'.*graft="),
    "another inverse": ({"inverse": "eigen"}, {}, "saved with inverse='eigen'.*inverse='cholesky'"),
    "another Fisher": ({"fisher": "type-2"}, {}, "saved with fisher='type-2'.*fisher='mc'"),
    "smaller blocks": ({"max_factor_dim": 2}, {}, "layer '0'.*max_factor_dim="),
    "fewer layers": ({"skip": ["2"]}, {}, "lacks the layers 2.*skip=.*strict=False"),
    "more layers": ({}, {"skip": ["2"]}, "does not have: 2.*skip=.*strict=False"),
}  # fmt: skip


@pytest.mark.promise("a state that does not fit")
@pytest.mark.parametrize(("saved", "here", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_state_of_other_settings_is_an_error_with_a_remedy(
    saved: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    first, second = Run(saved), Run(here)
    first.train(0, 2)
    second.train(0, 1)
    before = copy.deepcopy(second.optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert_same(second.optimizer.state_dict(), before)


@pytest.mark.promise("a state that does not fit")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_state_of_another_optimizer_is_an_error(kind: type[torch.optim.Optimizer]) -> None:
    run = Run({})
    with pytest.raises(ValueError, match="saved by another optimizer"):
        run.optimizer.load_state_dict(kind(run.model.parameters(), lr=0.1).state_dict())


@pytest.mark.promise("a state that does not fit")
def test_a_state_of_another_model_is_an_error_that_names_the_parameter() -> None:
    first, second = Run({}), Run({})
    second.model[1] = nn.PReLU(4)
    second.optimizer = KFAC(second.model, criterion=second.criterion)
    with pytest.raises(ValueError, match=r"shape \[1\] for the parameter '1.weight', .* \[4\]"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())


@pytest.mark.promise("a state that does not fit")
def test_a_fallback_that_refuses_its_state_leaves_everything_as_it_was() -> None:
    class Picky(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            raise ValueError("not this one")

    run = Run({"fallback": lambda groups: Picky(groups, lr=0.1)})
    run.train(0, 2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["fallback"]["base"][0] = [1.0, 1.0]
    run.train(2, 4)
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(ValueError, match="not this one"):
        run.optimizer.load_state_dict(saved)
    assert_same(run.optimizer.state_dict(), before)


@pytest.mark.promise("a state that does not fit")
def test_a_schedule_that_fails_at_the_saved_step_leaves_everything_as_it_was() -> None:
    first = Run({})
    first.train(0, 3)
    second = Run({"factor_update_period": lambda step: 1 if step < 3 else 0})
    second.train(0, 1)
    before = copy.deepcopy(second.optimizer.state_dict())
    with pytest.raises(ValueError, match="its schedule at step 3"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert_same(second.optimizer.state_dict(), before)


@pytest.mark.promise("a state that does not fit")
def test_a_loaded_state_is_a_copy() -> None:
    first, second = Run({"fallback": "adamw"}), Run({"fallback": "adamw"})
    first.train(0, 2)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    before = copy.deepcopy(second.optimizer.state_dict())
    first.train(2, 4)
    assert_same(second.optimizer.state_dict(), before)


# --- loading elsewhere -------------------------------------------------------------------------


def layers_of(run: Run) -> dict[str, Any]:
    layers: dict[str, Any] = run.optimizer.state_dict()["kfac"]["layers"]
    return layers


@pytest.mark.promise("another `skip`, other layers")
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize(("first", "second"), [(["0"], ["4"]), (["4"], []), ([], ["0"])])
def test_with_strict_false_layers_that_both_have_are_loaded_and_others_start_anew(
    first: list[str], second: list[str], fallback: str
) -> None:
    saved_run = Run({"skip": first, "fallback": fallback, "lr": 0.02})
    saved_run.train(0, 3)
    saved = copy.deepcopy(saved_run.optimizer.state_dict())
    run = Run({"skip": second, "fallback": fallback, "factor_update_period": 10})
    run.train(0, 3)  # state of its own, which loading must replace
    fresh = layers_of(Run({"skip": second}))
    run.optimizer.load_state_dict(saved, strict=False)
    for name, layer in layers_of(run).items():
        both = name in saved["kfac"]["layers"]
        assert_same(layer, saved["kfac"]["layers"][name] if both else fresh[name])
    state = run.optimizer.state_dict()
    assert_same(state["state"], saved["state"])
    assert state["param_groups"][0]["lr"] == 0.02
    assert state["kfac"]["steps"] == 3
    if fallback == "adamw":
        theirs, mine = saved["fallback"], state["fallback"]
        numbers = [n for members in theirs["parameters"] for n in members]
        for i, number in enumerate(n for members in mine["parameters"] for n in members):
            if number in numbers:
                there = theirs["optimizer"]["state"][numbers.index(number)]
                assert_same(mine["optimizer"]["state"][i], there)
            else:
                assert i not in mine["optimizer"]["state"]
    run.train(3, 4)  # not due, but new layers need statistics; a warning would be an error
    assert all(layer["ready"] for layer in layers_of(run).values())


@pytest.mark.promise("another `skip`, other layers")
def test_with_strict_false_a_fallback_that_was_not_saved_starts_anew() -> None:
    first, second = Run({}), Run({"fallback": "adamw"})
    first.train(0, 2)
    second.train(0, 2)
    second.optimizer.load_state_dict(first.optimizer.state_dict(), strict=False)
    assert not second.optimizer.state_dict()["fallback"]["optimizer"]["state"]
    second.train(2, 3)


@pytest.mark.promise("another `skip`, other layers")
def test_a_preconditioner_loads_the_layers_that_both_have() -> None:
    _, first, step = preconditioner(skip=["2"])
    _, second, _ = preconditioner()
    step(0)
    saved = first.state_dict()
    with pytest.raises(ValueError, match="lacks the layers 2"):
        second.load_state_dict(saved)
    second.load_state_dict(saved, strict=False)
    loaded = second.state_dict()["layers"]
    assert_same({name: loaded[name] for name in saved["layers"]}, saved["layers"])
    assert not loaded["2"]["ready"]


@pytest.mark.promise("another `skip`, other layers")
def test_with_strict_false_a_layer_of_another_shape_is_still_an_error() -> None:
    first, second = Run({"max_factor_dim": 2}), Run({"skip": ["2"]})
    with pytest.raises(ValueError, match=r"factors of shapes .* for the layer '0'"):
        second.optimizer.load_state_dict(first.optimizer.state_dict(), strict=False)


class Cast(nn.Module):
    """A layer that computes in a dtype of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.to(self.inner.weight)).tanh()
        return result


class Stacked:
    """Three layers of one shape, which one bucket holds unless something is done about it."""

    def __init__(self, dtypes: list[torch.dtype], **settings: Any) -> None:
        torch.manual_seed(0)
        layers = [Cast(dtype) for dtype in dtypes]
        self.model = nn.Sequential(*layers)
        self.optimizer = KFAC(self.model, factor_update_period=1, **settings)

    def train_step(self, step: int) -> None:
        self.optimizer.zero_grad()
        x, _ = batch(step)
        x = self.model(x)
        x.square().mean().backward()
        self.optimizer.step()


@pytest.mark.promise("other buckets")
def test_layers_load_whatever_they_are_stacked_with() -> None:
    single, double = torch.float32, torch.float64
    first = Stacked([single] * 3)
    second = Stacked([single, double, single], skip=["2.inner"])
    for step in range(3):
        first.train_step(step)
    saved = first.optimizer.state_dict()["kfac"]["layers"]
    second.optimizer.load_state_dict(first.optimizer.state_dict(), strict=False)
    loaded = second.optimizer.state_dict()["kfac"]["layers"]
    assert loaded.keys() == {"0.inner", "1.inner"}
    assert_same(loaded["0.inner"], saved["0.inner"])
    for kind in ("factors", "inverse"):
        for key, tensor in loaded["1.inner"][kind].items():
            assert tensor.dtype == double
            assert torch.equal(tensor, saved["1.inner"][kind][key].double())


@pytest.mark.promise("another dtype")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("saved_in", "here"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_a_state_loads_into_another_dtype(
    name: str, saved_in: torch.dtype, here: torch.dtype, tmp_path: Path
) -> None:
    settings = SETTINGS[name] | {"fisher": "type-2"}  # other numbers would mean other labels
    first = Run(settings, model=net().to(saved_in))
    first.train(0, 3)
    torch.save(first.optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Run(settings, model=net().to(here))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(saved)
    loaded = second.optimizer.state_dict()
    for part in ("state", "kfac"):
        assert_same(loaded[part], cast(saved[part], saved_in, here))
    for run in (first, second):
        run.train(3, 5)
    for one, other in zip(parameters(first.model), parameters(second.model), strict=True):
        assert other.dtype == here
        assert torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-4)


def cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, Mapping):
        return {key: cast(entry, old, new) for key, entry in value.items()}
    return value


@pytest.mark.promise("another dtype")
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_loads_in_the_dtype_of_a_model_that_was_converted(name: str, steps: int) -> None:
    first = Run(SETTINGS[name], model=net().double())
    first.train(0, 3)
    saved = copy.deepcopy(first.optimizer.state_dict())
    second = Run(SETTINGS[name])
    second.train(0, steps)
    second.model.double().load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(saved)
    assert_same(second.optimizer.state_dict(), saved)
    for run in (first, second):
        run.train(3, 5)
    assert_same(parameters(first.model), parameters(second.model))


@pytest.mark.promise("another dtype")
def test_a_state_loads_only_where_layers_of_one_shape_are_alike() -> None:
    run = Run({}, model=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)))
    run.train(0, 2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.model[1].double()
    with pytest.raises(RuntimeError, match=r"are no longer alike. Call update_layers\(\)"):
        run.optimizer.load_state_dict(saved)
    assert_same(run.optimizer.state_dict(), saved)
    run.optimizer.update_layers()
    run.optimizer.load_state_dict(saved)
    assert [run.optimizer.factor(name)[0].dtype for name in "01"] == [torch.float32, torch.float64]


@pytest.mark.promise("another dtype")
def test_a_state_that_overflows_in_a_narrower_dtype_is_an_error() -> None:
    first, second = Run({}, model=net().double()), Run({})
    first.train(0, 2)
    saved = first.optimizer.state_dict()
    saved["kfac"]["layers"]["2"]["factors"]["A"] *= 1e300
    with pytest.raises(ValueError, match=r"A of the layer '2' that is not finite in torch.float32"):
        second.optimizer.load_state_dict(saved)


@pytest.mark.promise("another device")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: a GPU")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("saved_on", "here"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_state_loads_on_another_device(
    name: str, saved_on: str, here: str, tmp_path: Path
) -> None:
    settings = SETTINGS[name] | {"fisher": "type-2"}  # the GPU draws other labels
    first = Run(settings, model=net().double().to(saved_on))
    first.train(0, 3)
    parts = {"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}
    torch.save(parts, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Run(settings, model=net().double().to(here))
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    for entries in second.optimizer.state.values():
        assert {tensor.device.type for tensor in entries.values()} <= {here}
    for run in (first, second):
        run.train(3, 5)
    for one, other in zip(parameters(first.model), parameters(second.model), strict=True):
        assert torch.allclose(one.cpu(), other.cpu(), rtol=1e-6, atol=1e-8)


# --- versions of the format --------------------------------------------------------------------


FILES = sorted(stored_states.FOLDER.glob("state_v*.pt"))


def test_there_is_a_file_of_every_version() -> None:
    versions = [f"state_v{number}" for number in range(1, stored_states.VERSION + 1)]
    assert [path.stem for path in FILES] == versions


@pytest.mark.promise("older versions of the format")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_stored_state_of_every_version_loads_and_goes_on(path: Path, name: str) -> None:
    stored = torch.load(path, weights_only=True)[name]
    run = Run(SETTINGS[name])
    run.train(0, 1)  # state of its own, which loading must replace
    run.model.load_state_dict(stored["model"])
    run.optimizer.load_state_dict(stored["optimizer"])
    first = stored_states.BEFORE
    run.train(first, first + stored_states.AFTER)
    for mine, expected in zip(parameters(run.model), stored["expected"], strict=True):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.promise("older versions of the format")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_stored_state_of_the_engine_loads(path: Path) -> None:
    stored = torch.load(path, weights_only=True)["engine"]
    engine = Preconditioner(net(), criterion=nn.CrossEntropyLoss())
    engine.load_state_dict(stored)
    for name, layer in engine.state_dict()["layers"].items():
        assert layer["ready"]
        assert layer["seen"]
        assert_same(layer["factors"], stored["layers"][name]["factors"])


@pytest.mark.promise("older versions of the format")
def test_damage_to_a_stored_state_of_version_1_is_an_error_that_changes_nothing() -> None:
    stored = torch.load(FILES[0], weights_only=True)
    for name in ("momentum", "fallback", "automatic"):
        run = Run(SETTINGS[name])
        before = copy.deepcopy(run.optimizer.state_dict())
        saved = stored[name]["optimizer"]
        for path, value in nodes(saved):
            # What version 1 could not tell: whether state of a parameter is missing.
            is_absent = "state" in path[:3]
            for damage, replacement in damages(value):
                if is_absent or is_legitimate(path, damage, value):
                    continue
                if path == ("kfac", "burned_in") and damage == "removed":
                    continue
                if "counters" in path and damage in ("removed", "empty"):
                    continue
                if path[0] == "fallback" and "param_groups" in path:
                    continue  # nor which settings the fallback's optimizer had
                with pytest.raises(ValueError, match="state dict"):
                    run.optimizer.load_state_dict(changed(saved, path, replacement))
        assert_same(run.optimizer.state_dict(), before)


@pytest.mark.promise("newer versions of the format")
def test_a_state_of_a_newer_release_is_an_error_that_says_so() -> None:
    run = Run({})
    saved = run.optimizer.state_dict()
    saved["kfac"]["version"] = stored_states.VERSION + 1
    with pytest.raises(ValueError, match=r"newer release.*Upgrade kfac"):
        run.optimizer.load_state_dict(saved)


# --- other ways to save ------------------------------------------------------------------------


@pytest.mark.promise("`torch.distributed.checkpoint.state_dict`")
def test_torch_checkpoints_without_the_curvature_are_refused() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    run = Run({})
    run.train(0, 2)
    before = copy.deepcopy(run.optimizer.state_dict())
    found = get_optimizer_state_dict(run.model, run.optimizer)
    assert "kfac" not in found
    with pytest.raises(ValueError, match="must hold K-FAC state"):
        set_optimizer_state_dict(run.model, run.optimizer, found)
    assert_same(run.optimizer.state_dict(), before)


@pytest.mark.promise("a state that does not fit")
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kfac", "layers", "0", "weight"), torch.tensor(-1.0), "negative weight.*'0'"),
        (("param_groups", 0, "nesterov"), True, "nesterov without momentum"),
    ],
)
def test_values_that_no_run_can_have_are_an_error(path: Path_, value: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = KFAC(model, momentum=0.0)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(changed(before, path, value))
    assert_same(optimizer.state_dict(), before)
