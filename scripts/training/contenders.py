"""The optimizers of the race: how each is made, and the learning rates that it is tuned over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import kfac
from peers.candidates import CANDIDATES, Candidate

HALF_DECADES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
HIGHER = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
GRAFT_ON_RMSPROP = 3  # LayerWiseGrafting.RMSPROP, which the package does not export


@dataclass(frozen=True)
class Entry:
    """What a contender gets: the model, the criterion of the loop, its rate and the run's seed."""

    model: nn.Module
    criterion: nn.Module
    learning_rate: float | None
    seed: int

    @property
    def lr(self) -> float:
        if self.learning_rate is None:
            raise ValueError("This optimizer has no default: give a learning rate.")
        return self.learning_rate


class Trainer:
    """One step of one or several optimizers that share the parameters of a model.

    Args:
        optimizers: All of them step after the same backward pass.
        with_closure: The only one of them evaluates the model itself.
    """

    def __init__(self, *optimizers: Optimizer, with_closure: bool = False) -> None:
        self.optimizers, self.with_closure = optimizers, with_closure

    def step(self, loss_of: Callable[[], Tensor]) -> Tensor:
        """Take a step on a batch; returns its loss."""

        def evaluate() -> Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = loss_of()
            torch.autograd.backward(loss)
            return loss

        if self.with_closure:
            # torch's stubs want a closure that returns a number; its own optimizers take tensors.
            stepping: Callable[[Any], Any] = self.optimizers[0].step
            return torch.as_tensor(stepping(evaluate))
        loss = evaluate()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


@dataclass(frozen=True)
class Contender:
    """An optimizer; without learning rates it runs at its default one.

    Args:
        build: Makes it for a model.
        settings: What it differs in from its defaults, for the reader and for the key of a run.
        learning_rates: What it is tuned over where the task has no grid of its own.
        package: Where it comes from.
        unsuitable: Why it cannot train a model.
        absent: Why it cannot be had although the package is there.
    """

    build: Callable[[Entry], Trainer]
    settings: str
    learning_rates: tuple[float, ...] = ()
    package: Candidate = CANDIDATES["SGD"]
    unsuitable: Callable[[nn.Module], str | None] = lambda model: None
    absent: Callable[[], str | None] = lambda: None

    def reason_to_skip(self, model: nn.Module) -> str | None:
        return self.absent() or self.package.missing() or self.unsuitable(model)


def sgd(entry: Entry) -> Trainer:
    return Trainer(SGD(entry.model.parameters(), lr=entry.lr, momentum=0.9))


def adamw(entry: Entry) -> Trainer:
    return Trainer(AdamW(entry.model.parameters(), lr=entry.lr, weight_decay=0.0))


def muon(entry: Entry) -> Trainer:
    hidden, others = hidden_matrices(entry.model)
    return Trainer(
        torch.optim.Muon(
            hidden, lr=entry.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        AdamW(others, lr=entry.lr, weight_decay=0.0),
    )  # fmt: skip


def hidden_matrices(model: nn.Module) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Split the weights between hidden units, for Muon, from all other parameters, for AdamW."""
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    first = 0 if any(isinstance(module, nn.Embedding) for module in modules) else 1
    hidden = [layer.weight for layer in layers[first:-1]]
    taken = {id(weight) for weight in hidden}
    return hidden, [p for p in model.parameters() if id(p) not in taken]


def unsuitable_for_muon(model: nn.Module) -> str | None:
    if any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in model.modules()):
        return "takes matrices only, and the hidden weights of this model are convolutions"
    return None


def no_muon() -> str | None:
    return None if hasattr(torch.optim, "Muon") else f"torch {torch.__version__} has no Muon"


def soap(entry: Entry) -> Trainer:
    make = import_module("pytorch_optimizer").SOAP
    return Trainer(make(entry.model.parameters(), lr=entry.lr, weight_decay=0.0))


def shampoo(entry: Entry) -> Trainer:
    make = import_module("pytorch_optimizer").ScalableShampoo
    return Trainer(
        make(
            entry.model.parameters(), lr=entry.lr, preconditioning_compute_steps=10,
            moving_average_for_momentum=True, graft_type=GRAFT_ON_RMSPROP,
        )
    )  # fmt: skip


def plain_kfac(entry: Entry) -> Trainer:
    given: dict[str, Any] = {} if entry.learning_rate is None else {"lr": entry.lr}
    return Trainer(kfac.KFAC(entry.model, criterion=entry.criterion, seed=entry.seed, **given))


def automatic_kfac(entry: Entry) -> Trainer:
    # By name, since a release without it must still run (and type-check) all others.
    make: Callable[..., Optimizer] = kfac.KFAC
    damping = getattr(kfac, "LevenbergMarquardt")()  # noqa: B009
    return Trainer(
        make(
            entry.model, lr="auto", momentum="auto", damping=damping, criterion=entry.criterion,
            seed=entry.seed,
        ),
        with_closure=True,
    )  # fmt: skip


def no_automatic_kfac() -> str | None:
    if hasattr(kfac, "LevenbergMarquardt"):
        return None
    return f"kfac {kfac.__version__} has no LevenbergMarquardt"


CONTENDERS = {
    "SGD": Contender(sgd, "momentum 0.9", HIGHER),
    "AdamW": Contender(adamw, "no weight decay", HALF_DECADES),
    "Muon": Contender(
        muon, "updates as large as AdamW's; AdamW for all but hidden matrices; no weight decay",
        HALF_DECADES, unsuitable=unsuitable_for_muon, absent=no_muon,
    ),
    "SOAP": Contender(soap, "no weight decay", HALF_DECADES, CANDIDATES["SOAP"]),
    "Shampoo": Contender(
        shampoo, "ScalableShampoo, roots every 10 steps, grafted on RMSProp", HALF_DECADES,
        CANDIDATES["ScalableShampoo"],
    ),
    "K-FAC": Contender(plain_kfac, "criterion given", HIGHER, CANDIDATES["kfac, mc"]),
    "K-FAC, default": Contender(
        plain_kfac, "criterion given, default learning rate", (), CANDIDATES["kfac, mc"]
    ),
    "K-FAC, auto": Contender(
        automatic_kfac, "criterion given, everything automatic", (), CANDIDATES["kfac, mc"],
        absent=no_automatic_kfac,
    ),
}  # fmt: skip
