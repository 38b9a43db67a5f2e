"""A small run of `scripts/corruption_test.py`, and that it would find what it looks for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import corruption_test
import kfac.factors
import kfac.optimizer
from corruption_test import Case, Corruption, cases, check_case, main

QUICK = settings(
    max_examples=50, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.promise("corruptions of any kind in a run")
@QUICK
@given(cases())
def test_a_run_with_corruptions_loses_nothing(case: Case) -> None:
    check_case(case)


def case(*corruptions: Corruption | None, mode: str = "plain", **settings: Any) -> Case:
    defaults: dict[str, Any] = {
        "net": "linear", "loss": "cross-entropy", "fisher": "empirical", "inverse": "cholesky",
        "mode": mode, "periods": (1, 1), "limit": 10, "with_scaler": False, "seed": 0,
        "resumed_at": 0,
    }  # fmt: skip
    padded = (*corruptions, *[None] * (corruption_test.STEPS - len(corruptions)))
    return Case(**defaults | settings, corruptions=padded)


def all_of(stack: Tensor) -> Tensor:
    return torch.ones(len(stack), dtype=torch.bool)


def always(*_: Any, **__: Any) -> Tensor:
    return torch.tensor(True)


@pytest.mark.parametrize(
    ("place", "name", "replacement", "corruption", "mode"),
    [
        (kfac.factors, "_are_finite", all_of, Corruption("statistics", "NaN"), "plain"),
        (
            kfac.optimizer,
            "stays_finite",
            always,
            Corruption("gradient of a layer", "inf"),
            "without clipping",
        ),
        (
            kfac.optimizer.KFAC,
            "load_state_dict",
            lambda *_: None,
            Corruption("damaged state dict", "other version"),
            "plain",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_lost_is_found(
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    replacement: Callable[..., Any],
    corruption: Corruption,
    mode: str,
) -> None:
    check_case(case(None, corruption, mode=mode))
    monkeypatch.setattr(place, name, replacement)
    monkeypatch.setattr(kfac.optimizer, "all_finite", always)
    with pytest.raises((AssertionError, RuntimeError)):
        check_case(case(None, corruption, mode=mode))


def test_the_script_counts_what_it_has_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--examples", "3", "--seed", "1"]) == 0
    assert "3 of 3 runs lost nothing" in capsys.readouterr().out
