#!/usr/bin/env python3
"""Corrupt short training runs at random, and see to it that nothing is lost.

Every example draws a small net, a configuration of `KFAC` and six steps, each of them clean or with
a corruption: bad inputs, targets, losses, gradients or statistics, decompositions that fail, an
overflow, passes that raise, a damaged state dict. After every step all parameters and all that the
optimizer keeps have to be finite and the counters right; at a step that is drawn too a second
optimizer takes over the state, and both have to stay the same bit for bit to the end, corruptions
included; and clean steps at the end have to move the parameters.
"""

import argparse
import copy
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac import KFAC, Cholesky, Eigen, Ekfac, InverseFree, LevenbergMarquardt, NewtonSchulz
from kfac.factors import Bucket
from kfac.inverse import Inverse

STEPS, EXAMPLES, INPUTS, CLASSES = 6, 5, 6, 3
VALUES = {"NaN": math.nan, "inf": math.inf, "1e30": 1e30, "denormal": 1e-40, "zero": 0.0}


class Mixed(nn.Module):
    """An embedding of the signs of the first inputs, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inside = nn.Embedding(4, 4), nn.Linear(INPUTS, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, :3] > 0).long() + 2 * (x[:, 3:] > 0).long()
        output: Tensor = self.head((self.table(tokens).mean(1) + self.inside(x)).tanh())
        return output


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, INPUTS)), nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(2 * INPUTS, CLASSES),
    ),
    "norm": lambda: nn.Sequential(
        nn.Linear(INPUTS, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, CLASSES)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(INPUTS, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, CLASSES)
    ),
    "embedding": Mixed,
}  # fmt: skip
INVERSES: dict[str, Callable[[int], Inverse]] = {
    "cholesky": Cholesky,
    "eigen": Eigen,
    "eigen, warm start": lambda limit: Eigen(limit, warm_start=True),
    "ekfac": Ekfac,
    "newton-schulz": NewtonSchulz,
    "inverse-free": InverseFree,
}
AUTOMATIC: dict[str, dict[str, Any]] = {
    "auto": {"lr": "auto", "momentum": "auto"},
    "adaptive": {"lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt()},
    "searching": {"lr": "auto", "damping": LevenbergMarquardt(search_period=2, period=2)},
}
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "without clipping": {"kl_clip": None, "momentum": 0.0},
    "nesterov": {"nesterov": True, "weight_decay": 0.1},
    "graft sgd": {"graft": "sgd"},
    "graft adam": {"graft": "adam"},
    "adamw": {"fallback": "adamw", "skip": [nn.Tanh, "*0"]},
}


class Broken(Exception):
    """Raised on purpose."""


@dataclass(frozen=True)
class Corruption:
    """What goes wrong in a step.

    Attributes:
        kind: Where.
        value: What is put there, where something is.
        place: Where exactly, and how late.
    """

    kind: str
    value: str = ""
    place: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.value}".strip()


@dataclass(frozen=True)
class Case:
    """One run."""

    net: str
    loss: str
    fisher: str
    inverse: str
    mode: str
    periods: tuple[int, int]
    limit: int
    with_scaler: bool
    seed: int
    corruptions: tuple[Corruption | None, ...]
    resumed_at: int

    @property
    def is_automatic(self) -> bool:
        return self.mode in AUTOMATIC


KINDS = {
    "input": list(VALUES),
    "target": ["NaN", "inf", "1e30"],
    "loss times": ["NaN", "inf", "1e30", "zero"],
    "gradient of a layer": list(VALUES),
    "element of a gradient": ["NaN", "inf", "1e30"],
    "statistics": ["NaN", "inf", "1e30", "zero"],
    "missing gradient": [""],
    "failing decompositions": [""],
    "raising backward pass": [""],
    "raising closure": [""],
    "damaged state dict": ["without a layer", "misshapen", "other version", "without factors"],
}


@st.composite
def corruptions(draw: st.DrawFn) -> Corruption:
    kind = draw(st.sampled_from(list(KINDS)))
    return Corruption(kind, draw(st.sampled_from(KINDS[kind])), draw(st.integers(0, 5)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    net = draw(st.sampled_from(list(NETS)))
    fishers = ["empirical", "mc", "forward-only"]
    if net != "batch norm":
        fishers.append("type-2")  # which warns that the examples mix
    fisher = draw(st.sampled_from(fishers))
    inverses = [n for n in INVERSES if fisher != "forward-only" or n != "ekfac"]
    mode = draw(st.sampled_from([*PLAIN, *AUTOMATIC]))
    happening = st.one_of(st.none(), corruptions(), corruptions())
    return Case(
        net=net,
        loss=draw(st.sampled_from(["cross-entropy", "squared error"])),
        fisher=fisher,
        inverse=draw(st.sampled_from(inverses)),
        mode=mode,
        periods=draw(st.sampled_from([(1, 1), (1, 3), (2, 4)])),
        limit=draw(st.sampled_from([2, 10])),
        with_scaler=mode in PLAIN and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        corruptions=tuple(draw(st.lists(happening, min_size=STEPS, max_size=STEPS))),
        resumed_at=draw(st.integers(0, STEPS)),
    )


class Run:
    """A model and its optimizer, and what is expected of its counters."""

    def __init__(self, case: Case, original: "Run | None" = None) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        self.model = NETS[case.net]()
        is_classified = case.loss == "cross-entropy"
        self.criterion: nn.Module = nn.CrossEntropyLoss() if is_classified else nn.MSELoss()
        given = {"lr": 0.1, "damping": 0.1} | (PLAIN | AUTOMATIC)[case.mode]
        self.optimizer = KFAC(
            self.model, criterion=self.criterion, fisher=case.fisher,  # type: ignore[arg-type]
            inverse=INVERSES[case.inverse](case.limit), factor_update_period=case.periods[0],
            inverse_update_period=case.periods[1], **self._applicable(given),
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=case.with_scaler)
        self.steps = 0
        if original is not None:
            self.model.load_state_dict(original.model.state_dict())
            self.optimizer.load_state_dict(copy.deepcopy(original.optimizer.state_dict()))
            self.scaler.load_state_dict(original.scaler.state_dict())
            self.steps = original.steps

    def _applicable(self, given: dict[str, Any]) -> dict[str, Any]:
        if "skip" in given:
            first = next(n for n, m in self.model.named_modules() if list(m.parameters(False)))
            given = given | {"skip": [first]}
        return given

    # --- a step -----------------------------------------------------------------------------------

    def step(self, number: int, corruption: Corruption | None) -> None:
        """Take a step with or without a corruption.

        Raises:
            RuntimeError: If there is an error that has not been provoked.
        """
        if corruption is not None and corruption.kind == "damaged state dict":
            self._load_damaged(corruption)
            corruption = None
        torch.manual_seed(number)
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            late = corruption is not None and corruption.place % 3 + 1
            if corruption is not None and corruption.kind == "raising closure" and calls == late:
                raise Broken
            return self._evaluate(number, corruption)

        before = self.parameters()
        scale = self.scaler.get_scale()
        try:
            with surroundings(corruption):
                if not self.case.is_automatic:
                    closure()
                    self.scaler.step(self.optimizer)
                else:
                    self.optimizer.step(closure)
        except Broken:
            self._unchanged(before)
        except RuntimeError as error:
            if corruption is None or "could not be decomposed" not in str(error):
                raise
            self._unchanged(before)
        else:
            self.scaler.update()
            self.steps += self.scaler.get_scale() >= scale
        self.check()

    def _evaluate(self, number: int, corruption: Corruption | None) -> Tensor:
        kind, value, place = "", 0.0, 0
        if corruption is not None:
            kind, value = corruption.kind, VALUES.get(corruption.value, 0.0)
            place = corruption.place
        x, y = self.batch(number)
        if kind == "input":
            x[place % EXAMPLES if place else slice(None)] = value
        if kind == "target" and y.is_floating_point():
            y[place % EXAMPLES] = value
        self.optimizer.zero_grad()
        with ExitStack() as stack:
            if kind == "raising backward pass":
                stack.enter_context(raising(self.model, place))
            loss: Tensor = self.criterion(self.model(x), y)
        if kind == "loss times":
            loss = loss * value
        scaled: Tensor = self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.model.parameters())
        parameter = parameters[place % len(parameters)]
        assert parameter.grad is not None
        if kind == "gradient of a layer":
            parameter.grad.fill_(value)
        if kind == "element of a gradient":
            parameter.grad.view(-1)[0] = value
        if kind == "missing gradient":
            parameter.grad = None
        return loss.detach()

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.case.seed + number)
        x = torch.randn(EXAMPLES, INPUTS, generator=generator)
        if self.case.loss == "cross-entropy":
            return x, torch.randint(CLASSES, (EXAMPLES,), generator=generator)
        return x, torch.randn(EXAMPLES, CLASSES, generator=generator)

    def _load_damaged(self, corruption: Corruption) -> None:
        before = copy.deepcopy(self.optimizer.state_dict())
        damaged = copy.deepcopy(before)
        layers = damaged["kfac"]["layers"]
        name = list(layers)[corruption.place % len(layers)]
        if corruption.value == "without a layer":
            del layers[name]
        elif corruption.value == "misshapen":
            factors = layers[name]["factors"]
            key = sorted(factors)[0]
            factors[key] = factors[key][:0]
        elif corruption.value == "other version":
            damaged["kfac"]["version"] = 99
        else:
            del damaged["kfac"]
        try:
            self.optimizer.load_state_dict(damaged)
        except ValueError:
            assert same(self.optimizer.state_dict(), before), "a failed load has changed the state"
        else:
            raise AssertionError("a damaged state dict was loaded")

    # --- what has to hold -------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def _unchanged(self, before: list[Tensor]) -> None:
        assert same(self.parameters(), before), "an error has changed the parameters"

    def check(self) -> None:
        """All numbers are finite and the counters right."""
        for name, parameter in self.model.named_parameters():
            assert parameter.isfinite().all(), f"{name} is not finite"
        for path, tensor in tensors(self.optimizer.state_dict()):
            assert tensor.isfinite().all(), f"{path} is not finite"
        found = self.optimizer.diagnostics()
        assert found["steps"] == self.steps, f"{found['steps']} steps, not {self.steps}"
        assert 0 <= found["nonfinite_batches"] <= self.steps + found.get("rejected_steps", 0)
        assert found["factor_updates"] <= self.steps + STEPS  # those before an error stay

    def refused(self) -> int:
        """Number of steps that were not taken so far."""
        found = self.optimizer.diagnostics()
        return int(found["nonfinite_batches"] + found.get("rejected_steps", 0))


@contextmanager
def raising(model: nn.Module, place: int) -> Iterator[None]:
    """The backward pass of what is computed within it raises at the output of some layer."""

    def fail(gradient: Tensor) -> None:
        raise Broken

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(fail)  # type: ignore[no-untyped-call]

    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    handle = layers[place % len(layers)].register_forward_hook(watch)
    yield
    handle.remove()


@contextmanager
def surroundings(corruption: Corruption | None) -> Iterator[None]:
    """Within it statistics are corrupted, or decompositions fail."""
    with ExitStack() as stack:
        if corruption is not None and corruption.kind == "statistics":
            accumulate, value = Bucket.accumulate, VALUES[corruption.value]

            def spoil(
                bucket: Bucket, index: int, name: str, moment: Tensor, rows: int | Tensor = 0
            ) -> None:
                if index == corruption.place % len(bucket.names):
                    # A huge sum of outer products has no negative eigenvalues either.
                    scale = value if math.isfinite(value) else 1.0
                    moment = (moment * scale).contiguous()
                    if scale == 1.0:
                        moment.view(-1)[:: corruption.place + 1] = value
                accumulate(bucket, index, name, moment, rows)

            stack.enter_context(patch.object(Bucket, "accumulate", spoil))
        if corruption is not None and corruption.kind == "failing decompositions":
            for target, replacement in {
                "kfac.inverse.cholesky.inverse_by_cholesky": _no_inverses,
                "kfac.inverse.newton_schulz.inverse_by_cholesky": _no_inverses,
                "kfac.inverse.newton_schulz._iterate": lambda x, *_: x * math.nan,
                "kfac.inverse.eigen.eigenbasis": _no_eigenbasis,
                "kfac.inverse.eigen.follow": lambda m, *_: torch.zeros(len(m), dtype=torch.bool),
                "kfac.inverse.inverse_free._updated": lambda root, *_: root * math.nan,
            }.items():
                stack.enter_context(patch(target, replacement))
        yield


def _no_inverses(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    nothing = torch.full_like(matrices, math.nan)
    return (nothing,), torch.ones(len(matrices), dtype=torch.bool)


def _no_eigenbasis(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    (nothing,), failed = _no_inverses(matrices)
    return (nothing[..., 0], nothing), failed


def tensors(value: Any, path: str = "state") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers, and where they are."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}/{index}")


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, where what is not a number equals itself."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))


def differing(one: Any, other: Any) -> list[str]:
    """Where two states differ, for the message."""
    others = dict(tensors(other))
    return [path for path, t in tensors(one) if path not in others or not same(t, others[path])]


def check_case(case: Case) -> None:
    """Train with corruptions.

    Raises:
        AssertionError: If something was lost.
    """
    torch.set_num_threads(1)
    try:
        _check(case)
    except Exception as error:
        error.add_note(repr(case))
        raise


def _check(case: Case) -> None:
    run = Run(case)
    twin: Run | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, corruption in enumerate(case.corruptions):
            if number == case.resumed_at:
                twin = Run(case, run)
            for each in (run, twin) if twin is not None else (run,):
                each.step(number, corruption)
        twin = twin or Run(case, run)
        for number in range(STEPS, STEPS + 2):
            before, refused = run.parameters(), run.refused()
            run.step(number, None)
            twin.step(number, None)
            is_accepted = run.refused() == refused and run.scaler.get_scale() >= 2.0**8
            gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
            if is_accepted and any(bool(g.any()) for g in gradients):
                assert not same(run.parameters(), before), "a clean step has moved nothing"
    mine, theirs = (
        {"model": dict(r.model.named_parameters()), "optimizer": r.optimizer.state_dict()}
        for r in (run, twin)
    )
    assert same(mine, theirs), f"a resumed run differs in {differing(mine, theirs)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="number of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    options = parser.parse_args(arguments)
    drawn: Counter[str] = Counter()
    done = 0

    @seed(options.seed)
    @settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(cases())
    def check_all(case: Case) -> None:
        nonlocal done
        check_case(case)
        drawn.update(str(corruption) for corruption in case.corruptions if corruption)
        done += 1
        if sys.stderr.isatty() or done % 100 == 0:
            print(f"\r{done:,} of {options.examples:,}", end="", file=sys.stderr, flush=True)

    try:
        check_all()
    finally:
        print(file=sys.stderr)
    for name, count in sorted(drawn.items()):
        print(f"{count:6,}  {name}")
    print(f"{done:,} of {options.examples:,} runs lost nothing; {drawn.total():,} corruptions.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
