"""What one process measures: steps of an optimizer and of SGD in turn."""

import gc
import math
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peers.candidates import Candidate, Step, sgd
from peers.workloads import Batch, Workload

Samples = Mapping[str, list[tuple[float, float]]]
"""Milliseconds of the steps of a class, each with that of the step of SGD right after it."""
WARM_UP = 2  # at least so many steps, and a whole cycle, are not timed


def measure(
    candidate: Candidate, workload: Workload, *, steps: int, seed: int, device: str
) -> dict[str, Any]:
    """Figures of an optimizer, or the reason why there are none."""
    reason = candidate.missing()
    if reason:
        return {"reason": reason}
    model, batch = start(workload, seed, device)
    reason = candidate.unsuitable(model)
    if reason:
        return {"version": candidate.version(), "reason": reason}
    baseline, _ = start(workload, seed, device)
    cycles = time_steps(candidate, model, baseline, batch, steps)
    if not all(math.isfinite(p.sum().item()) for p in model.parameters()):
        raise ArithmeticError("its parameters are not finite after the timed steps")
    return {
        "version": candidate.version(),
        "milliseconds": medians(joined(cycles), milliseconds_of),
        "sgd_milliseconds": statistics.median(
            other for pairs in joined(cycles).values() for _, other in pairs
        ),
        "peak_megabytes": peak_megabytes(device),
        "rows": [row(candidate, cycles, *pair) for pair in candidate.periods],
        "cycles": cycles,
    }


def start(workload: Workload, seed: int, device: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(seed)
    model = workload.model().to(device)
    inputs, targets = workload.batch()
    return model, (inputs.to(device), targets.to(device))


def time_steps(
    candidate: Candidate, model: nn.Module, baseline: nn.Module, batch: Batch, steps: int
) -> list[Samples]:
    """Every step, by cycle and class."""
    step, other = candidate.build(model, batch), sgd(baseline, batch)
    length, device = candidate.cadence.inverse, batch[0].device
    warm_up = length * math.ceil(WARM_UP / length)
    for _ in range(warm_up):
        step()
        other()
    numbers = count(warm_up)
    gc.collect()
    return [
        one_cycle(candidate, step, other, numbers, length, device)
        for _ in range(math.ceil(steps / length))
    ]


def one_cycle(
    candidate: Candidate,
    step: Step,
    other: Step,
    numbers: Iterator[int],
    length: int,
    device: torch.device,
) -> Samples:
    samples: Samples = defaultdict(list)
    for _ in range(length):
        name = candidate.cadence.class_of(next(numbers))
        samples[name].append((milliseconds(step, device), milliseconds(other, device)))
    return samples


def milliseconds(step: Step, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(candidate: Candidate, cycles: list[Samples], factor: int, inverse: int) -> dict[str, Any]:
    """The mean step with other periods than those timed, composed from medians of classes."""
    result: dict[str, Any] = {"settings": candidate.settings.format(factor, inverse)}
    ratios = medians(joined(cycles), ratio_to_sgd)
    if not candidate.takes_steps:
        return result | {"factors_over_sgd": ratios["ordinary"]}
    result["mean_over_sgd"] = mean_step(ratios, factor, inverse)
    by_cycle = [mean_step(medians(c, ratio_to_sgd), factor, inverse) for c in cycles]
    if len(by_cycle) > 1:
        result["quartiles"] = statistics.quantiles(by_cycle, n=4, method="inclusive")[::2]
    if "factor" in ratios:
        result["factors_over_sgd"] = ratios["factor"] - ratios["ordinary"]
    return result


def mean_step(times: Mapping[str, float], factor: int, inverse: int) -> float:
    """Mean over a period: factors are updated every `factor` steps, inverses every `inverse`.

    An optimizer with one period has no steps of the class "factor".
    """
    ordinary = times["ordinary"]
    updating = times.get("factor", ordinary)
    refreshing = times.get("inverse", updating)
    return ordinary + (updating - ordinary) / factor + (refreshing - updating) / inverse


def joined(cycles: list[Samples]) -> Samples:
    return {name: [pair for cycle in cycles for pair in cycle[name]] for name in cycles[0]}


def medians(samples: Samples, quantity: Callable[[tuple[float, float]], float]) -> dict[str, float]:
    return {name: statistics.median(map(quantity, pairs)) for name, pairs in samples.items()}


def milliseconds_of(pair: tuple[float, float]) -> float:
    return pair[0]


def ratio_to_sgd(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1]


def peak_megabytes(device: str) -> float:
    """Highest memory of the process: on a CPU the resident one, else what torch has allocated."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / 1e6 if sys.platform == "darwin" else highest * 1024 / 1e6
