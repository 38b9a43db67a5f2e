"""Peak memory of a step, counted by torch's allocators."""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kfac import KFAC
from step_cost.schedule import Layers
from step_cost.trainers import Contest, Trainer


def allocated_at_peak(function: Callable[[], None], device: torch.device) -> int:
    """Bytes by which the memory in use grows during a call, at most."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((int(e["args"]["Bytes"]) for e in changes), initial=0))


def held_bytes(trainer: Trainer) -> int:
    """Bytes that are in use between steps, gradients apart: model and optimizer."""
    model = [*trainer.model.parameters(), *trainer.model.buffers()]
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors = {id(t): t for t in [*model, *states] if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values()) + curvature_bytes(trainer)


def curvature_bytes(trainer: Trainer) -> int:
    """Bytes of factors, pending sums and inverses."""
    if not isinstance(trainer.optimizer, KFAC):
        return 0
    estimate = trainer.optimizer.memory_estimate()
    return sum(size for kind, size in estimate.items() if kind != "momentum")


def measure_memory(contest: Contest, largest_turn: Layers) -> dict[str, float]:
    """Peak bytes of a step of every class: what is held between steps and what a step adds."""
    device = contest.batch[0].device
    result: dict[str, float] = {}
    for name, step in contest.classes().items():
        trainer = contest.baselines.get(name, contest.kfac)
        trainer.optimizer.zero_grad()
        result[name] = held_bytes(trainer) + allocated_at_peak(step, device)
    # The step before has updated the factors, and its gradients are still there.
    gradients = sum(
        p.grad.numel() * p.grad.element_size()
        for p in contest.kfac.model.parameters()
        if p.grad is not None
    )
    added = allocated_at_peak(lambda: contest.kfac.refresh(largest_turn), device)
    result["refresh"] = held_bytes(contest.kfac) + gradients + added
    result["curvature"] = curvature_bytes(contest.kfac)
    result["ratio"] = result["factor"] / (result["SGD"] + result["curvature"])
    return result
