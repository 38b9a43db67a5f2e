"""Under DistributedDataParallel every process takes the step of the whole batch."""

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac import KFAC, LevenbergMarquardt

RANKS = 2
AUTOMATIC: dict[str, Any] = {
    "lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt(period=2), "weight_decay": 0.01,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "empirical": {"fisher": "empirical"},
    "type-2": {"fisher": "type-2"},
    "forward-only": {"fisher": "forward-only"},
    "type-2, reduce, eigen": {"fisher": "type-2", "weight_sharing": "reduce", "inverse": "eigen"},
    "type-2, sum": {"fisher": "type-2", "reduction": "sum"},
    "empirical, sum": {"fisher": "empirical", "reduction": "sum"},
    "tokens, type-2": {"fisher": "type-2"},
    "tokens, empirical, ekfac": {"fisher": "empirical", "inverse": "ekfac"},
    "type-2, fraction": {"fisher": "type-2", "factor_fraction": 0.5},
    "tokens, empirical, ekfac, fraction": {
        "fisher": "empirical",
        "inverse": "ekfac",
        "factor_fraction": 0.5,
    },
    "automatic": {"fisher": "type-2", **AUTOMATIC},
    "automatic, sum": {"fisher": "type-2", "reduction": "sum", **AUTOMATIC},
}


# accelerate and Hugging Face's Trainer wrap a model whose optimizer is there already.
WRAPPED_AFTERWARDS = ["empirical", "type-2, sum", "mc", "automatic"]

# The examples that two processes use of a batch come first.
FIRST_OF_BOTH = [0, 1, 4, 5, 2, 3, 6, 7]


class Tokens(nn.Module):
    """An embedding that is also the output layer, attention, a norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x).transpose(1, 2)


def net(name: str = "") -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("tokens"):
        return Tokens().double()
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3))
    return model.double()


def batch(step: int, is_tokens: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if is_tokens:
        tokens = torch.randint(0, 5, (8, 6), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    x = torch.randn(8, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (8,), generator=generator)


def train(
    model: nn.Module,
    settings: dict[str, Any],
    rank: int,
    size: int,
    wrapped_afterwards: bool = False,
) -> KFAC:
    settings = dict(settings)
    criterion = nn.CrossEntropyLoss(reduction=settings.pop("reduction", "mean"))
    optimizer = KFAC(
        model, criterion=criterion, factor_update_period=2, inverse_update_period=2,
        **{"lr": 0.1, **settings},
    )  # fmt: skip
    if wrapped_afterwards:
        model = DistributedDataParallel(model)
    for step in range(4):
        is_tokens = isinstance(getattr(model, "module", model), Tokens)
        x, y = (part.chunk(size)[rank] for part in batch(step, is_tokens))
        if size == 1 and "factor_fraction" in settings:
            x, y = x[FIRST_OF_BOTH], y[FIRST_OF_BOTH]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return optimizer


def masked(rank: int) -> tuple[str, bool, int]:
    """What a step says if the mask of one process is wrong, whether it changed nothing, and how
    many steps there are after a batch whose masks are right."""
    tokens, target = (part.chunk(RANKS)[rank] for part in batch(0, True))
    model = DistributedDataParallel(net("tokens"))
    widths = [5 - rank, 5]
    optimizer = KFAC(
        model,
        criterion=nn.CrossEntropyLoss(),
        position_mask=lambda tokens: torch.ones(len(tokens), widths[0]),
    )
    before = [p.clone() for p in model.parameters()]
    error = ""
    for _ in range(2):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(tokens), target).backward()
        try:
            optimizer.step()
        except ValueError as refusal:
            error = str(refusal)
            factors = optimizer.diagnostics()["factor_updates"]
            is_same = factors == 0 and all(map(torch.equal, model.parameters(), before))
            widths.pop(0)
    return error, is_same, optimizer.diagnostics()["steps"]


def process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    found = {}
    for name, settings in {**CASES, "mc": {"fisher": "mc"}}.items():
        model = DistributedDataParallel(net(name))
        optimizer = train(model, settings, rank, RANKS)
        state = {k: v.clone() for k, v in model.module.state_dict().items()}
        found[name] = state, optimizer.factor("head" if name.startswith("tokens") else "3")
    for name in WRAPPED_AFTERWARDS:
        model = net()
        train(model, {"mc": {"fisher": "mc"}, **CASES}[name], rank, RANKS, wrapped_afterwards=True)
        found[f"{name}, wrapped afterwards"] = model.state_dict()
    found["masks"] = masked(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(process, args=(port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.promise("`DistributedDataParallel`")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_step_like_one_with_the_whole_batch(
    name: str, results: list[dict[str, Any]]
) -> None:
    model = net(name)
    train(model, CASES[name], 0, 1)
    for state, _ in (result[name] for result in results):
        for key, expected in model.state_dict().items():
            torch.testing.assert_close(state[key], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.promise("`DistributedDataParallel`")
def test_processes_stay_equal_though_each_samples_labels_of_its_own(
    results: list[dict[str, Any]],
) -> None:
    (first, factors), (second, others) = (result["mc"] for result in results)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(map(torch.equal, factors, others))


@pytest.mark.promise("`DistributedDataParallel`")
@pytest.mark.parametrize("name", WRAPPED_AFTERWARDS)
def test_the_model_may_be_wrapped_afterwards(name: str, results: list[dict[str, Any]]) -> None:
    before, _ = results[0][name]
    for after in (result[f"{name}, wrapped afterwards"] for result in results):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-11)


@pytest.mark.promise("`DistributedDataParallel`")
def test_a_mask_that_is_wrong_in_one_process_is_refused_in_all(
    results: list[dict[str, Any]],
) -> None:
    for error, is_same, steps in (result["masks"] for result in results):
        assert "KFAC(position_mask=...) must be [N, T] like the input of a layer" in error
        assert is_same
        assert steps == 1


def test_names_are_those_of_the_plain_model(results: list[dict[str, Any]]) -> None:
    plain = copy.deepcopy(results[0]["mc"][0])
    assert plain.keys() == net().state_dict().keys()
