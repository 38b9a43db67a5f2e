"""Refreshes of the inverses are spread over their period, and cost what is due."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from mutants import replace
from torch import Tensor, nn

from kfac import KFAC
from kfac.curvature import Curvature
from kfac.factors import BlockShape
from kfac.inverse import Cholesky

WIDTHS = [3, 8, 8, 8, 8, 2]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = pairwise(WIDTHS)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in sizes)).double()


def train(model: nn.Module, optimizer: KFAC, steps: int) -> list[dict[str, Tensor]]:
    """Inverse of A of every layer after every step."""
    criterion, history = nn.MSELoss(), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(20, WIDTHS[0], generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        criterion(model(x), x[:, : WIDTHS[-1]]).backward()
        optimizer.step()
        layers = optimizer.state_dict()["kfac"]["layers"]
        history.append({name: la["inverse"]["A_inverse"].clone() for name, la in layers.items()})
    return history


def changed(history: list[dict[str, Tensor]]) -> list[set[str]]:
    """Whose inverse each step but the first has changed."""
    pairs = pairwise(history)
    return [{n for n in new if not torch.equal(old[n], new[n])} for old, new in pairs]


def start(**settings: Any) -> tuple[nn.Module, KFAC]:
    model = net()
    return model, KFAC(model, lr=0.01, factor_update_period=1, **settings)


def test_every_layer_has_its_turn_once_in_a_period() -> None:
    model, optimizer = start(inverse_update_period=5)
    refreshed = changed(train(model, optimizer, 16))
    names = set(optimizer.state_dict()["kfac"]["layers"])
    for first in (4, 9):
        turns = refreshed[first : first + 5]
        assert set().union(*turns) == names
        assert sum(map(len, turns)) == len(names)
        assert max(map(len, turns)) < len(names)
    assert refreshed[4] == refreshed[9] == refreshed[14]


def test_turns_are_proportional_to_cost() -> None:
    blocks = start()[1]._engine.blocks
    for period in (1, 7, 100):
        turns = [blocks.due(step, period, staggered=True) for step in range(period)]
        assert sorted(name for turn in turns for name in turn) == sorted(blocks.layers)
    costs = [(a + 1) ** 3 + b**3 for a, b in pairwise(WIDTHS)]
    expected = [100 * sum(costs[:i]) // sum(costs) for i in range(len(costs))]
    assert [next(i for i, t in enumerate(turns) if str(n) in t) for n in range(5)] == expected


def test_without_staggering_all_have_it_at_once() -> None:
    model, optimizer = start(inverse_update_period=5, stagger_refreshes=False)
    refreshed = changed(train(model, optimizer, 11))
    names = set(optimizer.state_dict()["kfac"]["layers"])
    assert [turn for turn in refreshed if turn] == [names, names]
    assert refreshed[4] == refreshed[9] == names


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac", "newton-schulz", "inverse-free"])
def test_a_period_of_one_is_the_same_either_way(inverse: str) -> None:
    results = []
    for staggered in (True, False):
        model = net()
        optimizer = KFAC(
            model, lr=0.01, factor_update_period=1, inverse_update_period=1, inverse=inverse,
            stagger_refreshes=staggered,
        )  # fmt: skip
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(6, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def check_only_what_is_due_is_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    inverted: list[int] = []
    refresh = Cholesky.refresh

    def counting(
        self: Cholesky, block: BlockShape, factors: dict[str, Tensor], *arguments: Any
    ) -> Any:
        inverted.append(len(factors["A"]))
        return refresh(self, block, factors, *arguments)

    monkeypatch.setattr(Cholesky, "refresh", counting)
    model, optimizer = start(inverse_update_period=5)
    train(model, optimizer, 1)
    assert sum(inverted) == 5
    inverted.clear()
    train(model, optimizer, 5)
    assert sum(inverted) == 5


def test_only_what_is_due_is_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    check_only_what_is_due_is_inverted(monkeypatch)


def test_mutant_everything_refreshed_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = lambda original, self, step, period, staggered: frozenset(self.layers)  # noqa: E731
    replace(Curvature, "due", everything)(monkeypatch)
    with pytest.raises(AssertionError):
        check_only_what_is_due_is_inverted(monkeypatch)
