"""`scripts/benchmark_covariance.py` runs, agrees with float64 and writes its figures."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_covariance.py"
BASELINES = {
    (): ["loop over positions", "batched over positions", "einsum over positions"],
    ("--patches",): ["unfold + einsum", "unfold + bmm", "padded unfold + GEMM"],
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--threads", "1", "--repeats", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("table", BASELINES, ids=str)
def test_tables_compare_equal_quantities(table: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "figures.json"
    process = run(*table, "--shapes", "3,2,5,4", "2,6,2,2", "--json", str(path))
    assert process.returncode == 0, process.stderr
    figures: dict[str, Any] = json.loads(path.read_text())
    for shape in ([3, 2, 5, 4], [2, 6, 2, 2]):
        rows = {row["name"]: row for row in figures["results"] if row["shape"] == shape}
        assert rows["kfac.covariance"]["times_ours"] == 1
        for name in ["kfac.covariance", *BASELINES[table]]:
            assert rows[name]["relative_error"] < 1e-5
            assert rows[name]["milliseconds"] > 0
            assert name in process.stdout


def test_summary_compares_with_the_best_im2col_and_the_forward_pass(tmp_path: Path) -> None:
    process = run("--patches", "--shapes", "3,2,5,4", "2,6,2,2")
    assert process.returncode == 0, process.stderr
    pattern = (
        r"3×3, stride 1, padding 1: (\S+)× faster than the best im2col \(at least (\S+)×\), "
        r"(\S+)× the forward convolution"
    )
    found = re.search(pattern, process.stdout)
    assert found is not None
    mean, worst, forward = map(float, found.groups())
    assert mean >= worst > 0
    assert forward > 0


def test_calibration_times_every_method(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    process = run("--calibrate", "--shapes", "3,2,5,4", "2,6,2,2", "--json", str(path))
    assert process.returncode == 0, process.stderr
    figures: dict[str, Any] = json.loads(path.read_text())
    assert figures["kind"] == "cpu"
    for row in figures["results"]:
        assert set(row["milliseconds"]) == {"unfold", "weight gradient", "fourier"}
        assert set(row["expected"]) == set(row["milliseconds"])
        best = min(row["milliseconds"].values())
        assert row["loss"] == pytest.approx(row["milliseconds"][row["choice"]] / best)
        assert row["geometry"]["kernel_size"] == 3


def test_refuses_a_shape_that_is_no_feature_map() -> None:
    process = run("--shapes", "3,2,5")
    assert process.returncode == 2
    assert "must be N,C,H,W with positive sizes, but got '3,2,5'" in process.stderr
