#!/usr/bin/env python3
"""Time refreshes of eigenbases from scratch and from the last one, and their errors.

A small convolutional net is trained on scikit-learn's digits. Its factors at some steps are kept;
from those of one step to those of another, `Eigen()` and `Eigen(warm_start=True)` then refresh
every layer. Times are the best of three. Errors are those of a preconditioned gradient drawn with
the covariance of the later factors, relative to the decomposition in float64.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor, nn

import kfac.inverse.eigen
from kfac import KFAC, Eigen
from kfac.factors import BlockShape
from kfac.inverse.decompose import eigenbasis

State = dict[str, Tensor]
PAIRS = ((100, 110), (300, 310), (100, 200), (300, 400))


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def trained_factors(seed: int, damping: float) -> dict[int, list[State]]:
    """A and G of every layer, by step."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    labels = torch.tensor(digits.target)
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=0.03, damping=damping, criterion=criterion, inverse_update_period=10**6
    )
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    wanted, found = {step for pair in PAIRS for step in pair}, {}
    for step in range(max(wanted) + 1):
        chosen = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        loss: Tensor = criterion(model(images[chosen]), labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step in wanted:
            pairs = (zip("AG", optimizer.factor(name), strict=True) for name in names)
            found[step] = [{k: f[None] for k, f in p if f is not None} for p in pairs]
    return found


@contextmanager
def counted_decompositions() -> Iterator[list[int]]:
    counts: list[int] = []

    def counting(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        counts.append(len(matrices))
        return eigenbasis(matrices)

    with patch.object(kfac.inverse.eigen, "eigenbasis", counting):
        yield counts


def shape_of(factors: State) -> BlockShape:
    return BlockShape(1, factors["A"].shape[-1], factors["G"].shape[-1])


def refreshed(strategy: Eigen, factors: State, damping: float, last: State | None = None) -> State:
    block, like = shape_of(factors), factors["A"]
    if last is None:
        last = {k: like.new_zeros(1, *shape) for k, shape in strategy.state_shapes(block).items()}
    return strategy.refresh(block, factors, like.new_full((1,), damping), last)[0]


def milliseconds(strategy: Eigen, factors: State, damping: float, last: State) -> float:
    times = []
    for _ in range(3):
        start = perf_counter()
        refreshed(strategy, factors, damping, last)
        times.append(perf_counter() - start)
    return min(times) * 1e3


def relative_errors(states: list[State], factors: State, damping: float) -> list[float]:
    """Of preconditioned gradients, against the decomposition in float64."""
    exact = refreshed(Eigen(), {name: factor.double() for name, factor in factors.items()}, damping)
    generator = torch.Generator().manual_seed(0)
    size = (1, 1, factors["G"].shape[-1], factors["A"].shape[-1])
    gradient = torch.randn(size, generator=generator, dtype=torch.float64)
    roots = [
        exact[f"{k}_eigenvectors"] * exact[f"{k}_eigenvalues"].sqrt()[..., None, :] for k in "GA"
    ]
    gradient = roots[0] @ gradient @ roots[1].mT
    amount = torch.tensor([damping], dtype=torch.float64)
    expected, *found = (
        Eigen().precondition({k: t.double() for k, t in state.items()}, gradient, amount)
        for state in (exact, *states)
    )
    return [float((x - expected).norm() / expected.norm()) for x in found]


def report(old: list[State], new: list[State], damping: float, tolerance: float) -> str:
    warm, cold = Eigen(warm_start=True, tolerance=tolerance), Eigen()
    times, errors, decomposed = [0.0, 0.0], [], 0
    for before, after in zip(old, new, strict=True):
        last = refreshed(warm, before, damping)
        with counted_decompositions() as counts:
            state = refreshed(warm, after, damping, last)
        decomposed += sum(counts)
        errors.append(relative_errors([last, state], after, damping))
        times[0] += milliseconds(warm, after, damping, last)
        times[1] += milliseconds(cold, after, damping, {})
    (least, _), (most, _) = min(errors), max(errors)
    return (
        f"{least:>9.1%}{most:>9.1%}{max(e for _, e in errors):>9.1%}"
        f"{decomposed:>6} of {2 * len(old)}{times[0]:>9.1f}{times[1]:>9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    factors = trained_factors(options.seed, options.damping)
    print("errors of the old basis (least, most) and after a warm start (most); factors decomposed")
    print("after all; milliseconds of a warm start and of decompositions, all layers")
    for old, new in PAIRS:
        row = report(factors[old], factors[new], options.damping, options.tolerance)
        print(f"steps {old} to {new}{row}", flush=True)


if __name__ == "__main__":
    main()
