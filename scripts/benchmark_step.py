"""Time and peak memory of a training step under K-FAC, SGD and AdamW, and where the time goes.

    python scripts/benchmark_step.py
    python scripts/benchmark_step.py --workloads resnet20 --periods 1/10 10/100 --plot step.png
    python scripts/benchmark_step.py --device cuda --dtype bfloat16 --tf32 --json runs/step.json

Steps of all classes alternate in one process, each optimizer on a model of its own with the same
random batch. A class is timed by itself, --steps times: SGD, AdamW, K-FAC's ordinary steps (nothing
is due), its factor steps (statistics are taken), and the refreshes of inverses, each set of layers
that has its turn in one step by itself. The mean step is composed from the medians,

    mean = (1 - f) · ordinary + f · factor + r · refresh,

where f is the share of factor steps and r that of steps with a refresh (whose time comes on top of
the other two), counted over a whole cycle of the schedule. "quartiles" are those of the same ratio
taken in every round. "longest" is the longest step of a cycle. --fastest takes minima in place of
medians, for a machine that others use at the same time.

Stages are timed in steps of their own in between, by timers around methods. Each timer waits for
the device, so on a GPU their sum is more than a step takes. Time in a stage excludes the stages
inside it. "forward" and "backward" include the taps, "update" is what is left of the optimizer's
step.

Peak memory is the model, the optimizer and what torch's allocators hand out in a step at most;
buffers that BLAS and oneDNN keep for themselves are not seen on a CPU.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kfac.inverse import STRATEGIES
from step_cost.measuring import Measurement
from step_cost.report import draw, layer_table, stage_table, step_table
from step_cost.schedule import parse_periods
from step_cost.workloads import WORKLOADS

SHOWN = ("resnet20", "resnet18", "transformer")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    prepare(options)
    setting = settings(options)
    print(describe(setting), flush=True)
    results: dict[str, Any] = {}
    for name in options.workloads:
        results[name] = result = Measurement(WORKLOADS[name], options).run()
        print(f"\n{name}: {result['description']}, {result['parameters']} parameters")
        print(step_table(result) + "\n\n" + stage_table(result), flush=True)
        if options.layers:
            for row in result["periods"]:
                print("\n" + layer_table(row, options.layers), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(setting | {"workloads": results}, indent=2) + "\n")
    if options.plot:
        draw(options.plot, results, describe(setting))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--workloads", nargs="+", choices=list(WORKLOADS), default=list(SHOWN),
        metavar="NAME", help=f"of {', '.join(SHOWN)}; all by default",
    )  # fmt: skip
    add(
        "--periods", nargs="+", type=parse_periods, default=[parse_periods("default")],
        metavar="FACTOR/INVERSE", help="steps between factor updates and between refreshes, or "
        "'default' for those of KFAC; several share the measured steps",
    )  # fmt: skip
    add("--fisher", choices=["mc", "type-2", "empirical", "forward-only"], help="default of KFAC")
    add("--inverse", choices=list(STRATEGIES), help="default of KFAC")
    add("--no-stagger", action="store_true", help="refresh all inverses in one step")
    add("--steps", type=positive, default=7, help="rounds: timed steps of each class")
    add("--fastest", action="store_true", help="minima in place of medians")
    add("--warm-up", type=positive, default=2, help="steps of each class before")
    add("--layers", type=int, default=5, metavar="N", help="show the N costliest layers")
    add("--device", default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    add("--tf32", action="store_true", help="allow TF32 in products and convolutions")
    add("--threads", type=positive, help="CPU threads; torch decides if left out")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="PATH", help="also write the figures here")
    add("--plot", type=Path, metavar="PATH", help="also draw the stages here")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, but got {text!r}")
    return int(text)


def prepare(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if torch.device(options.device).type == "cuda":
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.tf32


def settings(options: argparse.Namespace) -> dict[str, Any]:
    on_cuda = torch.device(options.device).type == "cuda"
    given = {key: value for key, value in vars(options).items() if key not in ("json", "plot")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name(options.device) if on_cuda else cpu_name(),
        "options": given | {"periods": [str(pair) for pair in options.periods]},
        "threads": torch.get_num_threads(),
        "seed": options.seed,
    }


def describe(setting: dict[str, Any]) -> str:
    options = setting["options"]
    chosen = [options["dtype"] + (", TF32" if options["tf32"] else "")]
    chosen += [f"{key} {options[key]}" for key in ("fisher", "inverse") if options[key]]
    chosen += ["refreshes at once"] if options["no_stagger"] else []
    chosen += ["minima" if options["fastest"] else "medians", f"{options['steps']} rounds"]
    words = [setting["hardware"], f"{setting['threads']} threads", f"torch {setting['torch']}"]
    return ", ".join([*words, *chosen, f"seed {setting['seed']}"])


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
