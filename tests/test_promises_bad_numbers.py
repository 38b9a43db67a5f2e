"""Bad numbers change nothing that they should not, wherever they come from."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import (
    KFAC,
    Cholesky,
    Eigen,
    Ekfac,
    InverseFree,
    LevenbergMarquardt,
    NewtonSchulz,
    Preconditioner,
)
from kfac.factors import Bucket
from kfac.inverse import Inverse, cholesky, eigen, inverse_free, newton_schulz
from kfac.inverse.decompose import Routine

INVERSES = ["cholesky", "eigen", "ekfac", "newton-schulz", "inverse-free"]
FISHERS = ["empirical", "mc", "type-2", "forward-only"]
# EKFAC measures gradients, of which there are none in a forward pass.
PAIRS = [(i, f) for i in INVERSES for f in FISHERS if (i, f) != ("ekfac", "forward-only")]
EVERY_STEP = {"factor_update_period": 1, "inverse_update_period": 1}
# What counts bad batches and the steps that they were, and what follows from that count.
TALLIES = {"steps", "dropped_statistics", "nonfinite_batches", "factor_updates"}
TALLIES |= {"inverse_refreshes", "skipped_refreshes", "kl_clip_scale", "captures_next", "made_from"}

Closure = Callable[[], Tensor]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 3),
    )


class Run:
    """A model, its optimizer and batches that are the same in every run."""

    def __init__(self, model: nn.Module | None = None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = net() if model is None else model
        self.criterion = nn.CrossEntropyLoss()
        defaults = {"lr": 0.1, "damping": 0.1, "criterion": self.criterion, **EVERY_STEP}
        self.optimizer = KFAC(self.model, **defaults | settings)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(6, 2, 4, 4, generator=generator)
        return x, torch.randint(3, (6,), generator=generator)

    def closure(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Closure:
        def evaluate() -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = self.criterion(self.model(x), y) * factor
            loss.backward()
            return loss

        return evaluate

    def backward(self, number: int) -> None:
        self.closure(*self.batch(number))()

    def step(self, number: int) -> None:
        self.backward(number)
        self.optimizer.step()

    def train(self, steps: int) -> None:
        for number in range(steps):
            self.step(number)

    def state(self, *, without: set[str] = frozenset()) -> Any:
        """Everything that a step may change: parameters, random numbers, the optimizer's state."""
        everything = {
            "model": {k: p.detach() for k, p in self.model.named_parameters()},
            "random": torch.get_rng_state(),
            "optimizer": self.optimizer.state_dict(),
        }
        return copy.deepcopy(_without(everything, without))

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return value


def identical(one: Any, other: Any) -> bool:
    """Bit for bit; what is not a number equals itself."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(identical(a, b) for a, b in pairs)
    return one == other or (one != one and other != other)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else ():
        yield from tensors(item)


def all_are_finite(run: Run) -> bool:
    return all(t.isfinite().all() for t in tensors(run.state()))


# --- batches that are not finite ------------------------------------------------------------------


def bad_input(run: Run) -> None:
    x, y = run.batch(7)
    x[2, 1, 0, 3] = math.nan
    run.closure(x, y)()


def infinite_input(run: Run) -> None:
    x, y = run.batch(7)
    x[0] = math.inf
    run.closure(x, y)()


def bad_loss(run: Run) -> None:
    run.closure(*run.batch(7), factor=math.nan)()


def infinite_loss(run: Run) -> None:
    run.closure(*run.batch(7), factor=math.inf)()


def bad_gradient_of_one_layer(run: Run) -> None:
    run.backward(7)
    run.model[0].weight.grad.fill_(math.nan)


def one_infinite_element(run: Run) -> None:
    run.backward(7)
    run.model[-1].bias.grad[1] = -math.inf


BAD_BATCHES = [
    bad_input, infinite_input, bad_loss, infinite_loss, bad_gradient_of_one_layer,
    one_infinite_element,
]  # fmt: skip


def check_without_a_trace(bad_batch: Callable[[Run], None], **settings: Any) -> None:
    run, clean = Run(**settings), Run(**settings)
    for number in range(2):
        run.step(number), clean.step(number)
    bad_batch(run)
    before = run.state(without=TALLIES)
    run.optimizer.step()
    assert identical(run.state(without=TALLIES), before)
    assert run.optimizer.diagnostics()["nonfinite_batches"] == 1
    if settings["fisher"] == "mc":
        clean.optimizer._engine.steps += 1  # which seeds the labels
        clean.optimizer._engine._vectors.start_step(3)
    for number in range(2, 4):
        torch.manual_seed(number)
        run.step(number)
        torch.manual_seed(number)
        clean.step(number)
    assert identical(run.state(without=TALLIES), clean.state(without=TALLIES))


@pytest.mark.promise("NaN or inf in the inputs, the loss or a gradient")
@pytest.mark.parametrize("bad_batch", [bad_input, bad_gradient_of_one_layer])
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
def test_a_batch_that_is_not_finite_leaves_everything_bit_for_bit(
    inverse: str, fisher: str, bad_batch: Callable[[Run], None]
) -> None:
    check_without_a_trace(bad_batch, inverse=inverse, fisher=fisher)


@pytest.mark.promise("NaN or inf in the inputs, the loss or a gradient")
@pytest.mark.parametrize("bad_batch", BAD_BATCHES)
@pytest.mark.parametrize(
    "settings",
    [
        {"graft": "adam"},
        {"graft": "sgd", "nesterov": True, "weight_decay": 0.1},
        {"fallback": "adamw", "skip": ["0"]},
        {"kl_clip": None, "momentum": 0.0},
        {"factor_update_period": 2, "inverse_update_period": 4, "stagger_refreshes": False},
        {"refresh_tolerance": 0.1},
    ],
    ids=str,
)
def test_it_leaves_no_trace_under_any_setting(
    settings: dict, bad_batch: Callable[[Run], None]
) -> None:
    run = Run(fisher="type-2", **settings)
    run.train(3)  # of the periods above, the bad batch is in the middle
    bad_batch(run)
    before = run.state(without=TALLIES)
    run.optimizer.step()
    assert identical(run.state(without=TALLIES), before)
    parameters = run.parameters()
    run.step(3)
    assert all_are_finite(run)
    assert not any(map(torch.equal, run.parameters(), parameters))


@pytest.mark.promise("NaN or inf in the inputs, the loss or a gradient")
@pytest.mark.parametrize("inverse", INVERSES)
def test_a_first_batch_that_is_not_finite_leaves_no_trace(inverse: str) -> None:
    run, clean = (Run(inverse=inverse, fisher="type-2") for _ in range(2))
    bad_input(run)
    run.optimizer.step()
    assert all_are_finite(run)
    run.train(3)
    clean.train(3)
    assert all(map(torch.equal, run.parameters(), clean.parameters()))


@pytest.mark.promise("NaN or inf in the inputs, the loss or a gradient")
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("damping", [0.1, LevenbergMarquardt()], ids=["given", "adaptive"])
@pytest.mark.parametrize("bad_batch", [infinite_input, bad_loss])
def test_a_bad_batch_leaves_no_trace_in_automatic_mode(
    inverse: str, damping: Any, bad_batch: Callable[[Run], None]
) -> None:
    run = Run(inverse=inverse, fisher="type-2", lr="auto", momentum="auto", damping=damping)

    def step(number: int) -> None:
        run.optimizer.step(run.closure(*run.batch(number)))

    step(0)
    step(1)
    before = run.state(without=TALLIES)

    def closure() -> Tensor:
        bad_batch(run)
        return torch.tensor(math.nan)

    run.optimizer.step(closure)
    assert identical(run.state(without=TALLIES), before)
    step(2)
    assert all_are_finite(run)
    assert not identical(run.state()["model"], before["model"])


@pytest.mark.promise("an overflow under a `GradScaler`")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
@pytest.mark.parametrize(
    "settings", [{}, {"graft": "adam"}, {"fallback": "adamw", "skip": ["0"]}], ids=str
)
def test_an_overflow_leaves_parameters_factors_and_counters_bit_for_bit(
    inverse: str, fisher: str, settings: dict
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run = Run(inverse=inverse, fisher=fisher, **settings)

    def step(number: int, factor: float) -> None:
        run.optimizer.zero_grad()
        x, y = run.batch(number)
        scaler.scale(run.criterion(run.model(x), y) * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()

    step(0, 1.0)
    before = run.state()
    step(1, math.inf)
    assert identical(run.state(), before)
    step(2, 1.0)
    assert not identical(run.state()["model"], before["model"])


# --- bad statistics of one layer ------------------------------------------------------------------


@contextmanager
def spoilt(layer: str, factor: str, value: float) -> Iterator[None]:
    """The statistics of one layer contain a number, beside the diagonal of dense factors."""
    accumulate = Bucket.accumulate

    def spoil(self: Bucket, index: int, kind: str, moment: Tensor, rows: Any = 0) -> None:
        if (self.names[index], kind) == (layer, factor):
            moment = moment.clone()
            moment[..., 0, 1] = value
        accumulate(self, index, kind, moment, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "accumulate", spoil)
        yield


@pytest.mark.promise("NaN or inf in the statistics of one layer")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_statistics_of_one_layer_are_dropped_for_that_layer_only(
    inverse: str, fisher: str, value: float
) -> None:
    run = Run(inverse=inverse, fisher=fisher)
    run.train(2)
    before = run.state()
    with spoilt("4", "A", value):
        run.step(2)
    after = run.state()
    layers, layers_before = (s["optimizer"]["kfac"]["layers"] for s in (after, before))
    assert identical(layers["4"], layers_before["4"])
    assert not identical(layers["0"]["factors"], layers_before["0"]["factors"])
    assert not any(map(torch.equal, after["model"].values(), before["model"].values()))
    assert run.optimizer.diagnostics()["dropped_statistics"] == 1
    assert all_are_finite(run)


def test_a_batch_with_bad_statistics_everywhere_still_moves_the_parameters() -> None:
    run = Run()
    run.train(2)
    before = run.state()
    original = Bucket.accumulate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Bucket, "accumulate",
            lambda self, index, name, moment, rows=0: original(
                self, index, name, moment * math.nan, rows
            ),
        )  # fmt: skip
        run.step(2)
    after = run.state()
    for name, layer in after["optimizer"]["kfac"]["layers"].items():
        assert identical(layer, before["optimizer"]["kfac"]["layers"][name])
    assert not any(map(torch.equal, after["model"].values(), before["model"].values()))


# --- steps that would leave the range of numbers --------------------------------------------------


def check_not_taken(run: Run, backward: Callable[[], None]) -> None:
    """A step changes neither parameters nor momentum, and is counted."""
    skipped = run.optimizer.diagnostics()["nonfinite_batches"]
    before = run.state()
    backward()
    run.optimizer.step()
    after = run.state()
    assert identical(after["model"], before["model"])
    assert identical(after["optimizer"]["state"], before["optimizer"]["state"])
    assert identical(after["optimizer"].get("fallback"), before["optimizer"].get("fallback"))
    assert run.optimizer.diagnostics()["nonfinite_batches"] == skipped + 1


@pytest.mark.promise("a step that would leave the range of the parameters' dtype")
def test_momentum_in_half_precision_never_overflows() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).half()
    run = Run(model, lr=1e-4, momentum=0.99, kl_clip=None, damping=1.0)

    def backward() -> None:
        x, y = run.batch(0)
        run.closure(x.half(), y)()
        for parameter in model.parameters():
            parameter.grad.fill_(3e4)

    backward()
    run.optimizer.step()
    skipped = run.optimizer.diagnostics()["nonfinite_batches"]
    assert skipped == 0
    for _ in range(4):
        backward()
        run.optimizer.step()
        assert all_are_finite(run)
    assert run.optimizer.diagnostics()["nonfinite_batches"] >= 3


@pytest.mark.promise("a step that would leave the range of the parameters' dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_huge_learning_rate_makes_no_parameter_infinite(
    dtype: torch.dtype, nesterov: bool
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).to(dtype)
    run = Run(model, kl_clip=None, nesterov=nesterov, weight_decay=0.1)

    def backward(number: int = 0) -> None:
        x, y = run.batch(number)
        run.closure(x.to(dtype), y)()

    backward()
    run.optimizer.step()
    run.optimizer.param_groups[0]["lr"] = torch.finfo(dtype).max
    check_not_taken(run, backward)
    run.optimizer.param_groups[0]["lr"] = 0.1
    before = run.parameters()
    backward(1)
    run.optimizer.step()
    assert all_are_finite(run)
    assert not any(map(torch.equal, run.parameters(), before))


@pytest.mark.promise("a step that would leave the range of the parameters' dtype")
@pytest.mark.parametrize("settings", [{"fallback": "adamw", "skip": ["0"]}, {"graft": "adam"}])
def test_second_moments_never_overflow(settings: dict) -> None:
    run = Run(**settings)
    run.train(2)

    def backward() -> None:
        run.backward(2)
        run.model[0].weight.grad.fill_(1e25)  # finite, unlike its square

    check_not_taken(run, backward)
    run.step(3)
    assert all_are_finite(run)


@pytest.mark.promise("a step that would leave the range of the parameters' dtype")
@pytest.mark.parametrize("settings", [{"lr": 1e38}, {"momentum": 0.5, "lr": 1e38}], ids=str)
def test_a_given_learning_rate_of_an_automatic_step_makes_no_parameter_infinite(
    settings: dict,
) -> None:
    run = Run(
        **{"momentum": "auto", "kl_clip": None} | settings | {"damping": LevenbergMarquardt()}
    )
    for number in range(6):
        run.optimizer.step(run.closure(*run.batch(number)))
        assert all_are_finite(run)
    assert run.optimizer.diagnostics()["rejected_steps"] > 0


# --- degenerate factors ---------------------------------------------------------------------------


def check_training(run: Run, batches: list[tuple[Tensor, Tensor]], steps: int = 5) -> None:
    for number in range(steps):
        run.closure(*batches[number % len(batches)])()
        run.optimizer.step()
        assert all_are_finite(run)
    assert run.optimizer.diagnostics()["nonfinite_batches"] == 0


@pytest.mark.promise("zero inputs, dead ReLUs, gradients of zero")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
def test_zero_inputs_train_the_biases(inverse: str, fisher: str) -> None:
    run = Run(inverse=inverse, fisher=fisher)
    x, y = run.batch(0)
    head = run.parameters()[-1]
    check_training(run, [(torch.zeros_like(x), y)])
    assert not torch.equal(run.parameters()[-1], head)
    run.step(1)  # from here on there are inputs
    assert all_are_finite(run)


@pytest.mark.promise("zero inputs, dead ReLUs, gradients of zero")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
def test_layers_behind_dead_relus_stand_still_and_the_others_train(
    inverse: str, fisher: str
) -> None:
    run = Run(inverse=inverse, fisher=fisher)
    with torch.no_grad():
        run.model[0].bias.fill_(-100.0)
    before = run.parameters()
    check_training(run, [run.batch(number) for number in range(3)])
    after = run.parameters()
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[-1], before[-1])


@pytest.mark.promise("zero inputs, dead ReLUs, gradients of zero")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
def test_a_loss_of_zero_moves_nothing(inverse: str, fisher: str) -> None:
    run = Run(inverse=inverse, fisher=fisher)
    before = run.parameters()
    for number in range(3):
        run.closure(*run.batch(number), factor=0.0)()
        run.optimizer.step()
    assert all(map(torch.equal, run.parameters(), before))
    assert all_are_finite(run)
    run.step(3)
    assert not all(map(torch.equal, run.parameters(), before))


@pytest.mark.promise("factors of rank one, 1×1 factors, a batch of one")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
def test_a_batch_of_one_trains(inverse: str, fisher: str) -> None:
    run = Run(inverse=inverse, fisher=fisher)
    x, y = run.batch(0)
    losses = [run.criterion(run.model(x[:1]), y[:1]).item()]
    check_training(run, [(x[:1], y[:1])], steps=8)
    losses.append(run.criterion(run.model(x[:1]), y[:1]).item())
    assert losses[1] < losses[0]


@pytest.mark.promise("factors of rank one, 1×1 factors, a batch of one")
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_one_by_one_factors_follow_their_formula(inverse: str, damping: float) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    criterion = nn.MSELoss()
    x, y = torch.randn(5, 1).double(), torch.randn(5, 1).double()
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=damping, kl_clip=None, inverse=inverse,
        fisher="type-2", criterion=criterion, **EVERY_STEP,
    )  # fmt: skip
    before, a, g = model.weight.item(), x.square().mean().item(), 2.0
    criterion(model(x), y).backward()
    gradient = model.weight.grad.item()
    optimizer.step()
    root = math.sqrt(damping)
    factored = (a + math.sqrt(a / g) * root) * (g + math.sqrt(g / a) * root)
    divisor = a * g + damping if inverse in ("eigen", "ekfac") else factored
    assert model.weight.item() == pytest.approx(before - gradient / divisor, rel=1e-6)


def ill_conditioned(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer whose A has eigenvalues from 10⁻¹² to 1."""
    torch.manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(8, 8).double())
    rows, _ = torch.linalg.qr(torch.randn(64, 8).double())
    x = 8 * rows @ (torch.logspace(-6, 0, 8, dtype=torch.float64).diag() @ basis.T)
    return nn.Linear(8, 3, bias=False), x.float(), torch.randn(64, 3)


@pytest.mark.promise("factors of condition number 10¹²")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-12])
def test_ill_conditioned_factors_give_a_finite_direction_of_descent(
    inverse: str, fisher: str, damping: float
) -> None:
    model, x, y = ill_conditioned()
    a = x.double().T @ x.double() / len(x)
    assert torch.linalg.cond(a) == pytest.approx(1e12, rel=0.1)
    criterion = nn.MSELoss()
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=damping, kl_clip=None, inverse=inverse,
        fisher=fisher, criterion=criterion, **EVERY_STEP,
    )  # fmt: skip
    for _ in range(3):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        direction = before - model.weight.detach()
        assert direction.isfinite().all()
        assert (direction * model.weight.grad).sum() > 0
    assert optimizer.diagnostics()["failed_refreshes"] == 0


# --- decompositions that fail ---------------------------------------------------------------------


def failing(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """A :data:`Routine` that decomposes nothing."""
    nothing = torch.full_like(matrices, math.nan)
    return (nothing,), torch.ones(len(matrices), dtype=torch.bool)


def failing_eigenbasis(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    (nothing,), failed = failing(matrices)
    return (nothing[..., 0], nothing), failed


STRATEGIES: dict[str, Callable[..., Inverse]] = {
    "cholesky": Cholesky,
    "eigen": Eigen,
    "eigen, warm start": lambda **settings: Eigen(warm_start=True, tolerance=1e-9, **settings),
    "ekfac": Ekfac,
    "newton-schulz": lambda **settings: NewtonSchulz(tolerance=1e-30, **settings),
    "inverse-free": InverseFree,
}


@contextmanager
def no_decompositions() -> Iterator[None]:
    """Every strategy fails, with all remedies."""
    routines: list[tuple[Any, str, Routine | Any]] = [
        (cholesky, "inverse_by_cholesky", failing),
        (newton_schulz, "inverse_by_cholesky", failing),
        (eigen, "eigenbasis", failing_eigenbasis),
        (eigen, "follow", lambda matrices, *_: torch.zeros(len(matrices), dtype=torch.bool)),
        (inverse_free, "_updated", lambda root, whitened, step_size: root * math.nan),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, replacement in routines:
            patch.setattr(module, name, replacement)
        yield


def inverses_of(run: Run) -> Any:
    return {
        name: layer["inverse"]
        for name, layer in run.state()["optimizer"]["kfac"]["layers"].items()
        if name != "3"  # whose factors are diagonal or 2×2 and handled alike
    }


@pytest.mark.promise("a decomposition that fails")
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_failed_decomposition_keeps_the_last_good_inverse_until_one_succeeds(name: str) -> None:
    run = Run(inverse=STRATEGIES[name]())
    run.train(2)
    good = inverses_of(run)
    with no_decompositions():
        for number in (2, 3):
            before = run.parameters()
            run.step(number)
            assert identical(inverses_of(run), good)
            assert not any(map(torch.equal, run.parameters(), before))
    assert run.optimizer.diagnostics()["failed_refreshes"] >= 2 * 2
    run.step(4)
    assert not identical(inverses_of(run), good)
    assert all_are_finite(run)


@pytest.mark.promise("a decomposition that fails")
@pytest.mark.parametrize("name", STRATEGIES)
def test_without_a_first_inverse_the_gradient_is_used_and_the_refresh_tried_again(
    name: str,
) -> None:
    run = Run(inverse=STRATEGIES[name](), momentum=0.0, kl_clip=None)
    before = run.parameters()
    with no_decompositions():
        run.step(0)
    for p, b in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * p.grad)
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.step(1)
    found = {k: t for layer in inverses_of(run).values() for k, t in layer.items()}
    assert all(t.any() for k, t in found.items() if not k.endswith(("residual", "is_start")))


@pytest.mark.promise("too many failures in a row")
@pytest.mark.parametrize("name", STRATEGIES)
def test_too_many_failures_are_an_error_that_says_what_to_do(name: str) -> None:
    run = Run(inverse=STRATEGIES[name](max_consecutive_failures=3), damping=0.25)
    run.train(2)
    with no_decompositions():
        run.step(2)
        run.step(3)
        before = run.state()
        message = r"layer '0' \(A 19×19, G 3×3\).*3 times.*damping 0\.25.*Raise damping.*skip="
        with pytest.raises(RuntimeError, match=message):
            run.step(4)
    after = run.state()
    assert identical(after["model"], before["model"])
    assert identical(after["optimizer"]["state"], before["optimizer"]["state"])
    assert run.optimizer.diagnostics()["steps"] == 4
    run.step(5)  # once the reason is gone
    assert not identical(run.state()["model"], before["model"])
    assert all_are_finite(run)


@pytest.mark.promise("too many failures in a row")
@pytest.mark.parametrize("settings", [{}, {"search_period": 1}], ids=str)
def test_a_step_that_looks_for_its_damping_counts_one_failure(settings: dict) -> None:
    rule = LevenbergMarquardt(**settings)
    run = Run(inverse=Cholesky(max_consecutive_failures=3), lr="auto", damping=rule)

    def step(number: int) -> None:
        run.optimizer.step(run.closure(*run.batch(number)))

    with no_decompositions():
        step(0)
        step(1)
        with pytest.raises(RuntimeError, match="3 times in a row"):
            step(2)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.promise("an error in `step()`, the closure or the backward pass")
def test_an_error_in_a_scaled_step_leaves_the_next_step_as_it_is() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run, clean = (Run(fisher="type-2", inverse=Cholesky(1)) for _ in range(2))
    run.step(0), clean.step(0)
    run.optimizer.zero_grad()
    x, y = run.batch(1)
    scaler.scale(run.criterion(run.model(x), y)).backward()
    with no_decompositions(), pytest.raises(RuntimeError, match="could not be decomposed"):
        scaler.step(run.optimizer)
    for parameter in run.model.parameters():
        parameter.grad = None  # which tells the optimizer nothing
    x, y = clean.batch(1)
    clean.criterion(clean.model(x), y).backward()
    clean.optimizer._engine.update_factors(torch.tensor(True), 1.0)
    clean.optimizer._engine.discard()
    clean.optimizer._engine.capture.schedule(active=True)
    for each in (run, clean):
        each.model.zero_grad()
        x, y = each.batch(2)
        each.criterion(each.model(x), y).backward()
        each.optimizer.step()
    for one, other in zip(run.parameters(), clean.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("in the backward pass")


@pytest.mark.promise("an error in `step()`, the closure or the backward pass")
@pytest.mark.parametrize(("inverse", "fisher"), PAIRS)
def test_a_backward_pass_that_raises_leaves_no_trace(inverse: str, fisher: str) -> None:
    run, clean = (Run(inverse=inverse, fisher=fisher) for _ in range(2))
    run.step(0), clean.step(0)
    before = run.state()
    handle = run.model[1].register_forward_hook(lambda module, args, out: Broken.apply(out))
    with pytest.raises(ArithmeticError):
        run.step(1)
    handle.remove()
    assert identical(run.state(), before)
    run.step(2), clean.step(2)
    assert identical(run.state(), clean.state())


@pytest.mark.promise("an error in `step()`, the closure or the backward pass")
@pytest.mark.parametrize(("steps", "calls"), [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1)])
def test_a_closure_that_raises_in_an_automatic_step_leaves_no_trace(steps: int, calls: int) -> None:
    run, clean = (Run(lr="auto", momentum="auto", damping=LevenbergMarquardt()) for _ in range(2))
    for each in (run, clean):
        for number in range(steps):
            each.optimizer.step(each.closure(*each.batch(number)))
    before = run.state()
    good, made = run.closure(*run.batch(1)), []

    def closure() -> Tensor:
        if len(made) == calls:
            raise ArithmeticError("in the closure")
        made.append(1)
        return good()

    with pytest.raises(ArithmeticError):
        run.optimizer.step(closure)
    assert identical(run.state(), before)
    for each in (run, clean):
        each.optimizer.step(each.closure(*each.batch(2)))
    assert identical(run.state(), clean.state())


# --- buffers --------------------------------------------------------------------------------------


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))


@pytest.mark.promise("BatchNorm's running statistics after a bad batch")
@pytest.mark.parametrize("damping", [0.1, LevenbergMarquardt()], ids=["given", "adaptive"])
def test_a_bad_batch_leaves_the_running_statistics_in_automatic_mode(damping: Any) -> None:
    run = Run(with_batch_norm(), lr="auto", damping=damping)
    run.optimizer.step(run.closure(*run.batch(0)))
    run.optimizer.step(run.closure(*run.batch(1)))
    before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    x, y = run.batch(2)
    run.optimizer.step(run.closure(x * math.nan, y))
    assert identical(dict(run.model.named_buffers()), before)
    run.optimizer.step(run.closure(x, y))
    assert not identical(dict(run.model.named_buffers()), before)


@pytest.mark.promise("BatchNorm's running statistics after a bad batch")
def test_a_bad_batch_spoils_the_running_statistics_in_other_steps_as_with_any_optimizer() -> None:
    run = Run(with_batch_norm())
    run.train(2)
    x, y = run.batch(2)
    before = run.parameters()
    run.closure(x * math.nan, y)()
    run.optimizer.step()
    assert run.model[1].running_mean.isnan().all()
    assert all(map(torch.equal, run.parameters(), before))


class Cached(nn.Module):
    """Keeps the positions of the longest input so far, and counts on it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.longest = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.longest:
            self.longest = len(x)
            self.register_buffer("positions", torch.arange(len(x)).float())
        result: Tensor = self.inner(x) + self.positions[: len(x), None].sin()
        return result


@pytest.mark.promise("buffers that a forward pass makes or resizes, in automatic mode")
@pytest.mark.parametrize("lengths", [(4, 4, 8, 2), (2, 4, 8, 16)], ids=str)
def test_caches_that_a_forward_pass_makes_or_resizes_are_kept(lengths: tuple[int, ...]) -> None:
    run = Run(Cached(), lr="auto", momentum="auto", damping=LevenbergMarquardt())
    before = run.parameters()
    for length in lengths:
        run.optimizer.step(run.closure(torch.randn(length, 4), torch.arange(length) % 3))
    assert not any(map(torch.equal, run.parameters(), before))
    run.optimizer.step(run.closure(torch.full((32, 4), math.nan), torch.arange(32) % 3))
    assert len(run.model.positions) == 32


@pytest.mark.promise("an error in `step()`, the closure or the backward pass")
def test_a_closure_of_an_automatic_step_may_fail_after_its_backward_pass() -> None:
    run = Run(lr="auto", damping=LevenbergMarquardt())
    before = run.parameters()

    def closure() -> Tensor:
        run.model.zero_grad()  # not the optimizer's, which would tell it to forget the batch
        x, y = run.batch(0)
        loss: Tensor = run.criterion(run.model(x), y)
        loss.backward()
        if closures.pop():
            raise KeyError("once")
        return loss

    closures = [False] * 20 + [True]
    with pytest.raises(KeyError):
        run.optimizer.step(closure)
    run.optimizer.step(closure)
    assert not any(map(torch.equal, run.parameters(), before))


@pytest.mark.promise("an error in `step()`, the closure or the backward pass")
def test_a_closure_that_fails_leaves_no_statistics() -> None:
    run, clean = (Run(fisher="empirical") for _ in range(2))
    x, y = run.batch(0)

    def failing() -> Tensor:
        run.criterion(run.model(100 * x), y).backward()
        raise KeyError("after the backward pass")

    with pytest.raises(KeyError):
        run.optimizer.step(failing)
    run.model.zero_grad()
    for each in (run, clean):
        each.criterion(each.model(x), y).backward()
        each.optimizer.step()
    for mine, theirs in zip(run.optimizer.factor("4"), clean.optimizer.factor("4"), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.promise("an error in `step()`, the closure or the backward pass")
def test_an_error_in_the_step_of_a_preconditioner_leaves_no_statistics() -> None:
    factors = []
    for fails in (False, True):
        torch.manual_seed(0)
        model, criterion, dampings = net(), nn.CrossEntropyLoss(), [0.1]
        preconditioner = Preconditioner(
            model, criterion=criterion, fisher="empirical", damping=lambda _, d=dampings: d[-1]
        )
        x, y = torch.randn(6, 2, 4, 4), torch.arange(6) % 3
        if fails:
            dampings.append(-1.0)
            criterion(model(100 * x), y).backward()
            with pytest.raises(ValueError, match="damping"):
                preconditioner.step()
            dampings.pop()
            model.zero_grad()
        criterion(model(x), y).backward()
        preconditioner.step()
        factors.append(preconditioner.factor("4")[0])
    assert torch.equal(*factors)


@pytest.mark.promise("an error in `step()`, the closure or the backward pass")
def test_a_setting_that_is_refused_leaves_no_note_of_a_scaler() -> None:
    run, scaler = Run(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, y = run.batch(0)
    scaler.scale(run.criterion(run.model(x), y)).backward()
    run.optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        scaler.step(run.optimizer)
    assert not {"grad_scale", "found_inf"} & vars(run.optimizer).keys()


class Masked(nn.Module):
    """One class is masked out by a bias of -inf, which is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(x), x.new_zeros(len(x), 1)], 1) + self.bias


@pytest.mark.promise("a step that would leave the range of the parameters' dtype")
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_an_infinity_that_is_meant_keeps_nothing_from_training(fallback: Any) -> None:
    run = Run(Masked(), fallback=fallback)
    before = run.parameters()
    for _ in range(3):
        run.closure(torch.randn(6, 4), torch.arange(6) % 3)()
        run.optimizer.step()
    assert run.optimizer.diagnostics()["nonfinite_batches"] == 0
    assert not any(map(torch.equal, run.parameters(), before))
    assert run.model.bias.isinf().tolist() == [False, False, False, True]
