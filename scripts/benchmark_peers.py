"""Step time and memory of K-FAC beside optimizers of other packages.

    pip install ".[peers]"
    python scripts/benchmark_peers.py
    python scripts/benchmark_peers.py --workload transformer --steps 8 --json runs/peers.json
    python scripts/benchmark_peers.py --only SOAP "kfac, mc"

Every optimizer runs in a process of its own, where its steps alternate with those of SGD on an
identical model with the same random batch. Every step is divided by the one of SGD right after it,
so that other load cancels and ratios can be compared across processes. A package that is missing or
fails is listed with the reason.

The mean step is composed from the medians of these ratios over classes of steps. In the timed run
the periods are short (factors every 2 steps, inverses every 4; every 2 if there is one period
only), so that a few steps hold every class:

    mean = ordinary + (factor - ordinary) / factor period + (inverse - factor) / inverse period.

In brackets are the quartiles of this ratio over cycles of the timed run. "factors / SGD" is what a
factor step takes beyond an ordinary one, or all that a package does that computes nothing else.
Inverses of our own are refreshed all in one step, so that these steps can be told apart. Learning
rate and, in K-FAC, damping are 1e-3; what is not named is the package's default.

"peak MB" is the highest resident memory of the process, with Python, torch and SGD's model in it;
on a GPU it is what torch has allocated.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peers.candidates import CANDIDATES
from peers.measuring import measure
from peers.workloads import WORKLOADS

HEADINGS = (
    "optimizer", "package", "settings", "ordinary step (SGD), ms", "mean step / SGD",
    "factors / SGD", "peak MB",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        print("\n" + json.dumps(work(options)))
        return 0
    setting = settings(options)
    print(describe(setting), flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name in options.only or CANDIDATES:
        results[name] = run_worker(name, options)
        print(f"  {name}: {progress(results[name])}", file=sys.stderr, flush=True)
    print("\n" + table(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = json.dumps(setting | {"results": results}, indent=2, ensure_ascii=False)
        options.json.write_text(figures + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", choices=list(WORKLOADS), default="resnet20")
    add("--only", nargs="+", choices=list(CANDIDATES), metavar="NAME", help=", ".join(CANDIDATES))
    add("--steps", type=int, default=24, help="timed steps, rounded up to whole cycles")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="of one optimizer")
    add("--device", default="cpu")
    add("--threads", type=int, help="CPU threads; torch decides if left out")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="PATH", help="also write the figures here")
    add("--worker", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    return parser


# --- processes ---------------------------------------------------------------------------------


def run_worker(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one optimizer from a process of its own."""
    command = [sys.executable, __file__, "--worker", name]
    for key in ("workload", "steps", "device", "threads", "seed"):
        if getattr(options, key) is not None:
            command += [f"--{key}", str(getattr(options, key))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {options.timeout:g} seconds"}
    if done.returncode:
        last = (done.stderr.splitlines() or [""])[-1]
        return {"reason": f"exit status {done.returncode}: {last}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(options: argparse.Namespace) -> dict[str, Any]:
    candidate, workload = CANDIDATES[options.worker], WORKLOADS[options.workload]
    try:
        return measure(
            candidate, workload, steps=options.steps, seed=options.seed, device=options.device
        )
    except Exception as error:
        message = (str(error).splitlines() or [""])[0]
        return {"version": candidate.version(), "reason": f"{type(error).__name__}: {message}"}


# --- report ------------------------------------------------------------------------------------


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown; optimizers without figures in a list below it."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|---|---:|---:|---:|---:|"]
    for name, result in results.items():
        for row in result.get("rows", ()):
            lines.append("| " + " | ".join(cells(name, result, row)) + " |")
    missing = {name: result["reason"] for name, result in results.items() if "reason" in result}
    if missing:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def cells(name: str, result: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    mean = ordinary = ""
    if "mean_over_sgd" in row:
        ordinary = f"{result['milliseconds']['ordinary']:.0f} ({result['sgd_milliseconds']:.0f})"
        mean = f"{row['mean_over_sgd']:.2f}"
        if "quartiles" in row:
            mean += " ({:.2f} to {:.2f})".format(*row["quartiles"])
    factors = f"{row['factors_over_sgd']:.2f}" if "factors_over_sgd" in row else ""
    peak = f"{result['peak_megabytes']:.0f}"
    return [name, result["version"], row["settings"], ordinary, mean, factors, peak]


def progress(result: Mapping[str, Any]) -> str:
    if "reason" in result:
        return str(result["reason"])
    return ", ".join(f"{name} {time:.1f} ms" for name, time in result["milliseconds"].items())


def settings(options: argparse.Namespace) -> dict[str, Any]:
    on_cuda = torch.device(options.device).type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "workload": WORKLOADS[options.workload].description,
        "steps": options.steps,
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name(options.device) if on_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "seed": options.seed,
    }


def describe(setting: Mapping[str, Any]) -> str:
    return (
        f"{setting['workload']}; {setting['hardware']}, {setting['threads']} threads, "
        f"torch {setting['torch']}, {setting['steps']} timed steps, seed {setting['seed']}"
    )


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
