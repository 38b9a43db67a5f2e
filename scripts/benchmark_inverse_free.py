#!/usr/bin/env python3
"""Time refreshes by "inverse-free" and by "cholesky", and tell what is left of the error.

Times are those of one d × d factor in float32, the best of five. For the errors, a small
convolutional net is trained on scikit-learn's digits, and from step 0 on every layer is refreshed
once per period, each time from the refresh before. An error is ‖M X − I‖/√d in the Frobenius norm,
for a damped factor M and its inverse X.
"""

import argparse
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmark_refresh import State, net, shape_of
from kfac import KFAC, Cholesky, InverseFree
from kfac.damping import damped, factored_damping
from kfac.factors import BlockShape
from kfac.inverse import Inverse

SIZES = (128, 256, 512, 1024)
COUNTS = (1, 2, 3, 5, 8)


def refreshed(
    strategy: Inverse, block: BlockShape, factors: State, damping: float, last: State | None = None
) -> State:
    like = next(iter(factors.values()))
    if last is None:
        last = {k: like.new_zeros(1, *shape) for k, shape in strategy.state_shapes(block).items()}
    return strategy.refresh(block, factors, like.new_full((1,), damping), last)[0]


def milliseconds(strategy: Inverse, size: int, damping: float) -> float:
    block = BlockShape(1, size, 1, g_kind="identity")
    rows = torch.randn(4 * size, size)
    factors = {"A": (rows.T @ rows / len(rows)).view(1, 1, size, size)}
    last, times = refreshed(strategy, block, factors, damping), []
    for _ in range(5):
        factors["A"] *= 1.01
        start = perf_counter()
        last = refreshed(strategy, block, factors, damping, last)
        times.append(perf_counter() - start)
    return min(times) * 1e3


def trained_factors(seed: int, damping: float, steps: int) -> list[list[State]]:
    """A and G of every layer, at every tenth step."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    labels = torch.tensor(digits.target)
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.03, damping=damping, criterion=criterion)
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    found = []
    for step in range(steps + 1):
        chosen = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        loss: Tensor = criterion(model(images[chosen]), labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 10 == 0:
            pairs = (zip("AG", optimizer.factor(name), strict=True) for name in names)
            found.append([{k: f[None] for k, f in p if f is not None} for p in pairs])
    return found


def errors(inverse: State, factors: State, damping: Tensor) -> list[float]:
    """‖M X − I‖/√d of both factors, from products in float64."""
    a, g = (factors[name].double() for name in "AG")
    amounts = factored_damping(a, g, damping, a.shape[-1], g.shape[-1])
    found = []
    for name, factor, amount in zip("AG", (a, g), amounts, strict=True):
        matrix = damped(factor, amount)[0, 0]
        eye = torch.eye(len(matrix), dtype=torch.float64)
        residual = matrix @ inverse[f"{name}_inverse"][0, 0].double() - eye
        found.append(float(residual.norm() / len(matrix) ** 0.5))
    return found


def followed(strategy: Inverse, layers: list[list[State]], damping: float) -> tuple[Tensor, Tensor]:
    """Errors ``[refreshes, factors]`` right before every refresh but the first, and after all."""
    before, after = [], []
    amount = torch.tensor([damping], dtype=torch.float64)
    for layer in zip(*layers, strict=True):
        block, last = shape_of(layer[0]), None
        for factors in layer:
            if last:
                before.append(errors(last, factors, amount))
            last = refreshed(strategy, block, factors, damping, last)
            after.append(errors(last, factors, amount))
    count = len(layers[0])
    stacked = (torch.tensor(found).view(count, -1, 2) for found in (before, after))
    first, second = (found.transpose(0, 1).flatten(1) for found in stacked)
    return first, second


def report(name: str, found: Tensor) -> str:
    late = found[len(found) // 2 :]
    return (
        f"{name:<36}{found[0].max():>10.1e}{found[:2][-1].max():>10.1e}"
        f"{late.median():>10.1e}{late.max():>10.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < 200:
        parser.error("--steps must be at least 200: two refreshes at a period of 100")
    torch.manual_seed(options.seed)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'milliseconds of a refresh':<25}", *(f"{size:>8}" for size in SIZES))
    for strategy in (Cholesky(), *(InverseFree(iterations=n) for n in (1, 2, 5))):
        times = (milliseconds(strategy, size, options.damping) for size in SIZES)
        label = f"{strategy.name} {getattr(strategy, 'iterations', '')}"
        print(f"{label:<25}", *(f"{t:>8.2f}" for t in times), flush=True)
    factors = trained_factors(options.seed, options.damping, options.steps)
    print("errors: largest at first and second refresh, median and largest of the later half")
    for period in (10, 100):
        layers = factors[:: period // 10]
        print(f"every {period} steps")
        before, _ = followed(Cholesky(), layers, options.damping)
        print(report("cholesky, before a refresh", before))
        for count in COUNTS:
            _, after = followed(InverseFree(iterations=count), layers, options.damping)
            print(report(f"inverse-free {count}", after), flush=True)


if __name__ == "__main__":
    main()
