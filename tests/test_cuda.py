"""On a GPU the steps are those of the CPU."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import KFAC, Eigen

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "empirical": {"fisher": "empirical"},
    "type-2": {"fisher": "type-2"},
    "type-2, reduce, eigen": {"fisher": "type-2", "weight_sharing": "reduce", "inverse": "eigen"},
    "type-2, ekfac": {"fisher": "type-2", "inverse": "ekfac"},
    "type-2, newton-schulz": {"fisher": "type-2", "inverse": "newton-schulz"},
    "type-2, inverse-free": {"fisher": "type-2", "inverse": "inverse-free"},
    "type-2, warm start": {"fisher": "type-2", "inverse": Eigen(warm_start=True)},
    "type-2, some refreshes skipped": {"fisher": "type-2", "refresh_tolerance": 0.5},
    "type-2, grafted": {"fisher": "type-2", "graft": "adam"},
    "empirical, small factors": {"fisher": "empirical", "max_factor_dim": 5},
    "forward-only": {"fisher": "forward-only"},
}


class Convolutions(nn.Sequential):
    """With groups, a norm layer and in-place activations."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            nn.Conv2d(2, 4, 3, stride=2, padding_mode="circular", padding=1),
            nn.Flatten(),
            nn.Linear(64, 3),
        )

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
        return x, torch.arange(6) % 3


class Tokens(nn.Module):
    """An embedding that is also the output layer, attention, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(7, 4), nn.EmbeddingBag(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.body = nn.LayerNorm(4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.bag(tokens).unsqueeze(1)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.body(self.body(x).tanh())).transpose(1, 2)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 7, (5, 4), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


NETS: dict[str, type[nn.Module]] = {"convolutions": Convolutions, "tokens": Tokens}


def net(name: str = "convolutions") -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().double()


def train(model: nn.Module, device: str, settings: dict[str, Any]) -> list[Tensor]:
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, factor_update_period=2, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x, target = (t.to(device) for t in model.batch(generator))
        optimizer.zero_grad()
        criterion(model(x), target).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("net_name", NETS)
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_on_a_gpu_equal_those_on_the_cpu(name: str, net_name: str) -> None:
    if "ekfac" in name and net_name == "convolutions":
        pytest.skip("its factors have equal eigenvalues, so their eigenvectors are not unique")
    model = net(net_name)
    moved = copy.deepcopy(model).cuda()
    for mine, theirs in zip(
        train(moved, "cuda", SETTINGS[name]), train(model, "cpu", SETTINGS[name]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_a_model_may_move_to_the_gpu_after_construction() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    model.cuda()
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64, device="cuda")
    criterion(model(x), torch.zeros(6, dtype=torch.int64, device="cuda")).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.fixture(params=["highest", "high"])
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("net_name", NETS)
def test_mixed_precision_trains_and_is_not_reported(
    net_name: str, dtype: torch.dtype | None
) -> None:
    model, criterion = net(net_name).float().cuda(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.05, criterion=criterion, inverse_update_period=2)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    generator = torch.Generator().manual_seed(1)
    x, target = (t.cuda() for t in model.batch(generator))
    x = x.float() if x.is_floating_point() else x
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            loss = criterion(model(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
