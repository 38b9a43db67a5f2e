import json
from pathlib import Path

import pytest

import benchmark_epochs
from benchmark_epochs import table

TINY = ["device=cpu", "epochs=1", "data.limit=16", "data.batch_size=8", "evaluations_per_epoch=1"]


def test_only_runs_that_are_not_finished_are_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--only", "sgd", "--seeds", "0", "--target", "0.9"]
    arguments += ["--output-dir", str(tmp_path), "--grid", "0.1"]
    assert benchmark_epochs.main(arguments) == 0
    assert "SGD, lr 0.1, seed 0 epoch 1/1" in capsys.readouterr().out
    assert benchmark_epochs.main([*arguments, "0.2"]) == 0
    output = capsys.readouterr().out
    assert "SGD, lr 0.1, seed 0 epoch" not in output
    assert "SGD, lr 0.2, seed 0 epoch 1/1" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["medians"] == {"SGD, lr 0.1": None, "SGD, lr 0.2": None}


def test_the_verdict_compares_medians_with_the_best_of_the_grid() -> None:
    epochs = {
        "K-FAC": [2.0, 1.0, 3.0],
        "SGD, lr 0.1": [5.0, 4.0, float("inf")],
        "SGD, lr 0.2": [4.0, 4.0, 4.0],
    }
    lines = table(epochs, (0, 1, 2), 0.97).splitlines()
    assert lines[-1] == "K-FAC needs 0.50 of the epochs of SGD, lr 0.2, the best of the grid."
    assert lines[-2].split()[-4:] == ["4.00"] * 4
