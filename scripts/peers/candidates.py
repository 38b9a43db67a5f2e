"""The optimizers, how each is set up, and on which of its steps it does which work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from kfac import KFAC
from peers.workloads import Batch

Step = Callable[[], object]
LR = 1e-3
DAMPING = 1e-3
DECAY = 0.95


@dataclass(frozen=True)
class Cadence:
    """Steps between updates of factors and of inverses in the timed run.

    Step n, counted from zero, does the work where n + phase is a multiple of the period.
    """

    factor: int = 1
    inverse: int = 1
    phase: int = 0

    def class_of(self, step: int) -> str:
        if self.inverse > 1 and (step + self.phase) % self.inverse == 0:
            return "inverse"
        if self.factor > 1 and (step + self.phase) % self.factor == 0:
            return "factor"
        return "ordinary"


@dataclass(frozen=True)
class Candidate:
    """An optimizer with the pairs of periods for which its mean step is reported."""

    build: Callable[[nn.Module, Batch], Step]
    settings: str
    module: str = "torch"
    distribution: str = "torch"
    cadence: Cadence = Cadence()
    periods: tuple[tuple[int, int], ...] = ((1, 1),)
    unsuitable: Callable[[nn.Module], str | None] = lambda model: None
    takes_steps: bool = True

    def missing(self) -> str | None:
        if find_spec(self.module) is None:
            return f"not installed: pip install {self.distribution}"
        return None

    def version(self) -> str:
        try:
            return f"{self.distribution} {metadata.version(self.distribution)}"
        except metadata.PackageNotFoundError:
            return self.distribution


def loop(model: nn.Module, batch: Batch, optimizers: Sequence[Optimizer]) -> Step:
    inputs, targets = batch
    criterion = nn.CrossEntropyLoss()
    return lambda: train(model, criterion, inputs, targets, optimizers)


def train(
    model: nn.Module,
    criterion: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    optimizers: Sequence[Optimizer],
) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    criterion(model(inputs), targets).backward()
    for optimizer in optimizers:
        optimizer.step()


def sgd(model: nn.Module, batch: Batch) -> Step:
    return loop(model, batch, [SGD(model.parameters(), lr=LR, momentum=0.9)])


def adamw(model: nn.Module, batch: Batch) -> Step:
    return loop(model, batch, [AdamW(model.parameters(), lr=LR)])


def ours(model: nn.Module, batch: Batch, *, fisher: Literal["mc", "empirical"]) -> Step:
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=LR, criterion=criterion, fisher=fisher, damping=DAMPING,
        factor_update_period=OF_TWO.factor, inverse_update_period=OF_TWO.inverse,
        stagger_refreshes=False,
    )  # fmt: skip
    inputs, targets = batch
    return lambda: train(model, criterion, inputs, targets, [optimizer])


# --- orthogonalised momentum -------------------------------------------------------------------


def muon(model: nn.Module, batch: Batch) -> Step:
    hidden, others = hidden_weights(model)
    muon = torch.optim.Muon(hidden, lr=LR)
    return loop(model, batch, [muon, AdamW(others, lr=LR)])


def flattening_muon(model: nn.Module, batch: Batch) -> Step:
    hidden, others = hidden_weights(model)
    groups = [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}]
    return loop(model, batch, [import_module("pytorch_optimizer").Muon(groups, lr=LR)])


def hidden_weights(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Split the weights of hidden layers, for Muon, from all other parameters, for AdamW."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hidden: list[Tensor] = [layer.weight for layer in layers[:-1]]
    taken = {id(weight) for weight in hidden}
    return hidden, [p for p in model.parameters() if id(p) not in taken]


def unsuitable_for_muon(model: nn.Module) -> str | None:
    if not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no Muon"
    if any(weight.ndim != 2 for weight in hidden_weights(model)[0]):
        return "takes matrices only, and the hidden weights of this model are convolutions"
    return None


# --- Shampoo and its relatives -----------------------------------------------------------------


def soap(model: nn.Module, batch: Batch) -> Step:
    optimizer = import_module("pytorch_optimizer").SOAP(
        model.parameters(), lr=LR, precondition_frequency=OF_ONE.inverse
    )
    return loop(model, batch, [optimizer])


def shampoo(model: nn.Module, batch: Batch) -> Step:
    optimizer = import_module("pytorch_optimizer").Shampoo(
        model.parameters(), lr=LR, momentum=0.9, preconditioning_compute_steps=OF_ONE.inverse
    )
    return loop(model, batch, [optimizer])


def scalable_shampoo(model: nn.Module, batch: Batch) -> Step:
    optimizer = import_module("pytorch_optimizer").ScalableShampoo(
        model.parameters(), lr=LR, start_preconditioning_step=1,
        statistics_compute_steps=OF_TWO.factor, preconditioning_compute_steps=OF_TWO.inverse,
    )  # fmt: skip
    return loop(model, batch, [optimizer])


# --- K-FAC and its relatives -------------------------------------------------------------------


def asdl(model: nn.Module, batch: Batch, *, fisher: str) -> Step:
    package = import_module("asdl")
    config = package.PreconditioningConfig(
        curvature_upd_interval=OF_TWO.factor, preconditioner_upd_interval=OF_TWO.inverse,
        damping=DAMPING, ema_decay=1 - DECAY, data_size=len(batch[1]),
        ignore_modules=[nn.Embedding],
    )  # fmt: skip
    maker = package.KfacGradientMaker(model, config, fisher_type=fisher)
    outputs = maker.setup_model_call(model, batch[0])
    maker.setup_loss_call(nn.CrossEntropyLoss(), outputs, batch[1])
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        maker.forward_and_backward()
        optimizer.step()

    return step


def singd(model: nn.Module, batch: Batch) -> Step:
    layers, others = layers_and_rest(model)
    per_token = len(batch[1]) > len(batch[0])
    optimizer = import_module("singd.optim.optimizer").SINGD(
        model, layers, lr=LR, T=OF_ONE.inverse, damping=DAMPING, normalize_lr_cov=True,
        loss_average="batch+sequence" if per_token else "batch",
    )  # fmt: skip
    return loop(model, batch, [optimizer, *([SGD(others, lr=LR, momentum=0.9)] if others else [])])


def curvlinops(model: nn.Module, batch: Batch, *, fisher: str) -> Step:
    operator = import_module("curvlinops").KFACLinearOperator
    layers, _ = layers_and_rest(model)
    inputs, targets = batch

    def compute_factors() -> None:
        operator(
            model, nn.CrossEntropyLoss(), layers, [batch], fisher_type=fisher,
            check_deterministic=False, separate_weight_and_bias=False, num_data=len(inputs),
            num_per_example_loss_terms=len(targets) // len(inputs),
        ).compute_kronecker_factors()  # fmt: skip

    return compute_factors


def layers_and_rest(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Split the parameters of linear layers and convolutions from all others."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    parameters: list[Tensor] = [p for layer in layers for p in layer.parameters()]
    taken = {id(p) for p in parameters}
    return parameters, [p for p in model.parameters() if id(p) not in taken]


OF_ONE = Cadence(inverse=2)
OF_TWO = Cadence(factor=2, inverse=4)
INVERSE_ONLY = ((1, 10), (1, 100))
BOTH = ((10, 100), (1, 10))
KFAC_SETTINGS = "factors every {0}, inverses every {1}"
ASDL_SETTINGS = KFAC_SETTINGS + "; unit-wise for norms, SGD for embeddings"

CANDIDATES = {
    "SGD": Candidate(sgd, "momentum 0.9; 1.00 but for noise"),
    "AdamW": Candidate(adamw, "defaults"),
    "kfac, mc": Candidate(
        partial(ours, fisher="mc"), KFAC_SETTINGS, "kfac", "kfac", OF_TWO, BOTH
    ),
    "kfac, empirical": Candidate(
        partial(ours, fisher="empirical"), KFAC_SETTINGS, "kfac", "kfac", OF_TWO, BOTH
    ),
    "asdl K-FAC, mc": Candidate(
        partial(asdl, fisher="fisher_mc"), ASDL_SETTINGS, "asdl", "asdfghjkl", OF_TWO, BOTH
    ),
    "asdl K-FAC, empirical": Candidate(
        partial(asdl, fisher="fisher_emp"), ASDL_SETTINGS, "asdl", "asdfghjkl", OF_TWO, BOTH
    ),
    "SINGD": Candidate(
        singd, "dense, empirical, factors every {1}; SGD for other layers", "singd", "singd",
        OF_ONE, INVERSE_ONLY,
    ),
    "SOAP": Candidate(
        soap, "statistics every step, bases every {1}", "pytorch_optimizer", "pytorch-optimizer",
        OF_ONE, INVERSE_ONLY,
    ),
    "Shampoo": Candidate(
        shampoo, "statistics every step, roots every {1}", "pytorch_optimizer",
        "pytorch-optimizer", Cadence(inverse=2, phase=1), INVERSE_ONLY,
    ),
    "ScalableShampoo": Candidate(
        scalable_shampoo, "statistics every {0}, roots every {1}", "pytorch_optimizer",
        "pytorch-optimizer", Cadence(factor=2, inverse=4, phase=1), BOTH,
    ),
    "Muon": Candidate(muon, "AdamW for the rest", unsuitable=unsuitable_for_muon),
    "Muon, flattening": Candidate(
        flattening_muon, "AdamW for norms, biases, embeddings, last layer", "pytorch_optimizer",
        "pytorch-optimizer",
    ),
    "curvlinops, mc": Candidate(
        partial(curvlinops, fisher="mc"), "the factors alone", "curvlinops",
        "curvlinops-for-pytorch", takes_steps=False,
    ),
    "curvlinops, empirical": Candidate(
        partial(curvlinops, fisher="empirical"), "the factors alone", "curvlinops",
        "curvlinops-for-pytorch", takes_steps=False,
    ),
}  # fmt: skip
