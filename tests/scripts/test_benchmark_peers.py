import argparse
import json
import os
from pathlib import Path

import pytest
from torch import nn

import benchmark_peers
from benchmark_peers import CANDIDATES, WORKLOADS, table, work
from peers.candidates import Cadence, Candidate, Step, sgd
from peers.measuring import mean_step, measure, row
from peers.workloads import Batch

FAKE_PACKAGE = """
import os
from torch.optim import SGD

class SOAP(SGD):
    def __init__(self, params, lr, precondition_frequency):
        super().__init__(params, lr)

class Shampoo(SOAP):
    def __init__(self, *arguments, **settings):
        os._exit(7)
"""


def options(name: str) -> argparse.Namespace:
    return benchmark_peers.parser().parse_args(["--worker", name, "--workload", "tiny"])


def failing(model: nn.Module, batch: Batch) -> Step:
    raise RuntimeError("no kernel for this\nand more")


def never_called(model: nn.Module, batch: Batch) -> Step:
    raise AssertionError


def test_one_that_kills_its_process_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pytorch_optimizer.py").write_text(FAKE_PACKAGE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *existing_path()]))
    figures = tmp_path / "new" / "peers.json"
    arguments = ["--workload", "tiny", "--steps", "4", "--threads", "1", "--json", str(figures)]
    assert benchmark_peers.main([*arguments, "--only", "Shampoo", "SOAP"]) == 0
    output = capsys.readouterr().out
    assert "- Shampoo: exit status 7" in output
    assert output.count("| SOAP |") == 2
    written = json.loads(figures.read_text())
    assert {"command", "torch", "hardware", "seed"} <= written.keys()
    soap = written["results"]["SOAP"]
    assert soap["peak_megabytes"] > 0
    assert {sum(map(len, cycle.values())) for cycle in soap["cycles"]} == {2}


def existing_path() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (
            Candidate(never_called, "", "no_such_package", "no-such-package"),
            "not installed: pip install no-such-package",
        ),
        (Candidate(failing, ""), "RuntimeError: no kernel for this"),
        (Candidate(never_called, "", unsuitable=lambda model: "knows no layer"), "knows no layer"),
    ],
)
def test_the_reason_stands_below_the_table(
    candidate: Candidate, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CANDIDATES, "SOAP", candidate)
    result = work(options("SOAP"))
    assert table({"SOAP": result}).splitlines()[-1] == f"- SOAP: {reason}"


def test_parameters_that_overflow_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(model: nn.Module, batch: Batch) -> Step:
        return lambda: [p.data.fill_(float("nan")) for p in model.parameters()]

    monkeypatch.setitem(CANDIDATES, "SOAP", Candidate(overflowing, ""))
    assert work(options("SOAP"))["reason"].startswith("ArithmeticError: its parameters are not")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("workload", ["tiny", "tiny-transformer"])
@pytest.mark.parametrize("name", ["SGD", "kfac, mc", "kfac, empirical", "curvlinops, mc", "Muon"])
def test_what_needs_no_further_package_runs(name: str, workload: str) -> None:
    result = measure(CANDIDATES[name], WORKLOADS[workload], steps=1, seed=0, device="cpu")
    if (name, workload) == ("Muon", "tiny"):
        assert "matrices" in result["reason"] or "no Muon" in result["reason"]
    elif "reason" in result:
        assert "no Muon" in result["reason"]
    else:
        assert all(("mean_over_sgd" in row) == ("curv" not in name) for row in result["rows"])


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        (Cadence(), "oooo oooo"),
        (Cadence(inverse=2), "ioio ioio"),
        (Cadence(inverse=2, phase=1), "oioi oioi"),
        (Cadence(factor=2, inverse=4), "iofo iofo"),
        (Cadence(factor=2, inverse=4, phase=1), "ofoi ofoi"),
    ],
)
def test_steps_are_told_apart_by_their_number(cadence: Cadence, expected: str) -> None:
    classes = "".join(cadence.class_of(step)[0] for step in range(8))
    assert f"{classes[:4]} {classes[4:]}" == expected


@pytest.mark.parametrize(("factor", "inverse"), [(1, 10), (10, 100), (2, 4), (3, 3)])
def test_the_mean_is_that_of_a_whole_period(factor: int, inverse: int) -> None:
    times = {"ordinary": 3.0, "factor": 5.0, "inverse": 11.0}
    whole = [
        times["inverse" if n % inverse == 0 else "factor" if n % factor == 0 else "ordinary"]
        for n in range(inverse)
    ]
    assert mean_step(times, factor, inverse) == pytest.approx(sum(whole) / inverse)


def test_an_optimizer_with_one_period_has_no_factor_steps() -> None:
    assert mean_step({"ordinary": 3.0, "inverse": 13.0}, 1, 10) == pytest.approx(4.0)
    assert mean_step({"ordinary": 3.0}, 1, 1) == 3.0


def test_load_that_slows_both_cancels() -> None:
    candidate = Candidate(sgd, "every {0} and {1}")
    idle = {"ordinary": [(4.0, 2.0)], "factor": [(6.0, 2.0)], "inverse": [(10.0, 2.0)]}
    busy = {name: [(9 * step, 9 * other)] for name, [(step, other)] in idle.items()}
    result = row(candidate, [idle, busy], 2, 4)
    assert result["settings"] == "every 2 and 4"
    assert result["mean_over_sgd"] == pytest.approx(3.0)
    assert result["quartiles"] == pytest.approx([3.0, 3.0])
    assert result["factors_over_sgd"] == pytest.approx(1.0)
