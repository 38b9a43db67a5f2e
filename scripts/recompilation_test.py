"""How often a compiled model is compiled anew in the course of training.

    python scripts/recompilation_test.py [--steps 50] [--backend aot_eager]

Trains a small convolution net for each way to compile it and each kind of step, with an evaluation
after every epoch and a short last batch, and prints how many graphs had been compiled after step 1,
10 and the last one. Fails if the number still grows after step 10, or is larger than without K-FAC.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from kfac import KFAC

EPOCH = (32, 32, 32, 32, 7)  # sizes of the batches
SETTLED = 10  # steps after which nothing may be compiled any more
MODES: dict[str, dict[str, Any]] = {
    "empirical": {"fisher": "empirical"},
    "mc": {"fisher": "mc"},
    "type-2": {"fisher": "type-2"},
    "forward-only": {"fisher": "forward-only"},
    "automatic": {"lr": "auto", "momentum": "auto"},
}


class Net(nn.Module):
    """A convolution net with a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 1, H, W]`` to logits ``[N, 3]``."""
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.block(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class CountingBackend:
    """Another backend, which counts the graphs that it is given."""

    def __init__(self, name: str) -> None:
        self.graphs = 0
        self._compile = lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compile a graph."""
        self.graphs += 1
        compiled: Callable[..., Any] = self._compile(graph, inputs)
        return compiled


def make_sgd(model: nn.Module, _: nn.Module) -> torch.optim.Optimizer:
    """What K-FAC is compared with."""
    return torch.optim.SGD(model.parameters(), lr=0.01)


def before(backend: CountingBackend, make: Callable[..., Any]) -> tuple[nn.Module, Any, nn.Module]:
    """``KFAC(torch.compile(model))``."""
    criterion = nn.CrossEntropyLoss()
    model: Any = torch.compile(Net(), backend=backend)
    return model, make(model, criterion), criterion


def after(backend: CountingBackend, make: Callable[..., Any]) -> tuple[nn.Module, Any, nn.Module]:
    """``torch.compile(model)`` when K-FAC has been constructed."""
    model, criterion = Net(), nn.CrossEntropyLoss()
    optimizer = make(model, criterion)
    compiled: Any = torch.compile(model, backend=backend)
    return compiled, optimizer, criterion


def in_place(
    backend: CountingBackend, make: Callable[..., Any]
) -> tuple[nn.Module, Any, nn.Module]:
    """``model.compile()`` when K-FAC has been constructed."""
    model, criterion = Net(), nn.CrossEntropyLoss()
    optimizer = make(model, criterion)
    model.compile(backend=backend)
    return model, optimizer, criterion


def graphs_by_step(
    way: Callable[..., tuple[nn.Module, Any, nn.Module]],
    make: Callable[[nn.Module, nn.Module], Any],
    backend_name: str,
    steps: int,
) -> Iterator[int]:
    """Train; after each step, how many graphs have been compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend = CountingBackend(backend_name)
    model, optimizer, criterion = way(backend, make)
    for step in range(steps):
        size = EPOCH[step % len(EPOCH)]
        x, y = torch.randn(size, 1, 8, 8), torch.randint(3, (size,))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(x), y)
            torch.autograd.backward(loss)
            return loss

        optimizer.step(closure)
        if step % len(EPOCH) == len(EPOCH) - 1:
            model.eval()
            with torch.no_grad():
                model(torch.randn(64, 1, 8, 8))
            model.train()
        yield backend.graphs


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the number of rows that fail is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    arguments = parser.parse_args(argv)
    rows: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [("SGD", before, make_sgd)]
    for mode, settings in MODES.items():

        def make(model: nn.Module, criterion: nn.Module, given: Any = settings) -> KFAC:
            return KFAC(
                model,
                criterion=criterion,
                factor_update_period=5,
                inverse_update_period=10,
                **given,
            )

        rows += [(mode, way, make) for way in (before, after, in_place)]
    failures, limit = 0, 0
    print(f"torch {torch.__version__}, backend {arguments.backend}: graphs compiled so far\n")
    print(f"| steps | compiled | step 1 | step {SETTLED} | step {arguments.steps} |")
    print("|---|---|---|---|---|")
    for name, way, make_optimizer in rows:
        graphs = list(graphs_by_step(way, make_optimizer, arguments.backend, arguments.steps))
        limit = limit or graphs[-1]  # of the first row, SGD's
        first, settled, last = graphs[0], graphs[min(SETTLED, len(graphs)) - 1], graphs[-1]
        has_failed = last > settled or last > limit
        failures += has_failed
        label = way.__name__.replace("_", " ")
        print(
            f"| {name} | {label} | {first} | {settled} | {last} |{' FAILED' * has_failed}",
            flush=True,
        )
    return failures


if __name__ == "__main__":
    sys.exit(main())
