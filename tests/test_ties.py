"""Modules that share a weight have one block and take one step."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from mutants import replace
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kfac.curvature
from kfac import KFAC
from kfac.curvature import Curvature
from kfac.factors import Bucket, nearest_kronecker

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
WIDTH, CLASSES, DAMPING, VOCABULARY = 4, 3, 0.3, 6
PLAIN: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": DAMPING, "inverse": "eigen",
    "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def train(model: nn.Module, data: Any, criterion: nn.Module, steps: int = 1, **chosen: Any) -> KFAC:
    if chosen.get("fisher") != "empirical":
        chosen["criterion"] = criterion
    optimizer = KFAC(model, **PLAIN | chosen)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(data[0]), data[1]).backward()
        optimizer.step()
    return optimizer


# --- linear layers ---------------------------------------------------------------------------


class Pair(nn.Module):
    """Two linear modules with one weight, in a row or side by side."""

    def __init__(self, tied: bool = True, parallel: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.two = nn.Linear(WIDTH, WIDTH) if tied else self.one
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.parallel = parallel
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return torch.cat([self.one(x), self.two(x.flip(0) * 2 + 1)], dim=1)
        return self.head(self.two(self.one(x).tanh()).mean(1))


@pytest.mark.promise("one module called several times in a forward pass")
@pytest.mark.promise("a weight shared by several modules")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
def test_tied_modules_step_like_one_module_that_is_called_twice(fisher: str, sharing: str) -> None:
    data = randn(5, 3, WIDTH), torch.arange(5) % CLASSES
    models = Pair(tied=True), Pair(tied=False)
    for model in models:
        train(model, data, nn.CrossEntropyLoss(), steps=3, fisher=fisher, weight_sharing=sharing)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        close(p, q)


def test_a_weight_tied_along_independent_paths_is_exact() -> None:
    model = Pair(parallel=True)
    x, target, criterion = randn(7, WIDTH), randn(7, 2 * WIDTH), nn.MSELoss()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = ["one.weight", "one.bias"]
    jacobian = jacrev(lambda values: functional_call(model, values, (x,)))(
        {name: before[name] for name in names}
    )
    columns = [
        jacobian["one.weight"].flatten(0, 1).flatten(2),
        jacobian["one.bias"].flatten(0, 1)[..., None],
    ]
    blocks = torch.cat([c.reshape(len(c), WIDTH, -1) for c in columns], dim=2).flatten(1)
    hessian = oracles.loss_hessian(model(x), target, criterion)
    fisher = blocks.T @ hessian @ blocks
    loss = criterion(model(x), target)
    weight, bias = torch.autograd.grad(loss, [model.one.weight, model.one.bias])
    gradient = torch.cat([weight, bias[:, None]], dim=1)[None]
    train(model, (x, target), criterion, fisher="type-2")
    expected = -oracles.solve(fisher[None], DAMPING, gradient)[0]
    close(model.one.weight - before["one.weight"], expected[:, :-1])
    close(model.one.bias - before["one.bias"], expected[:, -1])


def test_convolutions_of_different_geometry_may_share_a_weight() -> None:
    torch.manual_seed(0)
    near, far = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=2, dilation=2)
    far.weight, far.bias = near.weight, near.bias
    model = nn.Sequential(near, far).double()
    x = randn(4, 2, 5, 5)
    optimizer = train(model, (x, x), nn.MSELoss(), fisher="type-2")
    torch.manual_seed(0)
    reference = nn.Conv2d(2, 2, 3, padding=1).double()
    hidden = reference(x).detach()
    rows = torch.cat(
        [oracles.input_rows(layer, v, 4) for layer, v in ((near, x), (far, hidden))]
    ).flatten(0, 2)
    close(optimizer.factor("0")[0], (rows.T @ rows / len(rows))[None])


@pytest.mark.promise("a weight shared by several modules")
def test_modules_with_biases_of_their_own_leave_them_to_the_fallback() -> None:
    model = Pair()
    model.two.bias = nn.Parameter(randn(WIDTH))
    rows = {r.parameter: r for r in KFAC(model, lr=0.1).summary()}
    assert rows["one.weight"].factors == "A 1×4×4, G 1×4×4"
    assert rows["one.weight"].reason == "one block with two"
    assert rows["one.bias"].treatment == rows["two.bias"].treatment == "fallback"


@pytest.mark.promise("a weight shared by several modules")
@pytest.mark.parametrize("kind", ["another use", "an unknown module"])
def test_what_cannot_be_one_block_goes_to_the_fallback(kind: str) -> None:
    if kind == "another use":
        model = nn.Sequential(nn.Conv1d(3, 3, 2), nn.ConvTranspose1d(3, 3, 2))
        reason = "in different ways (Conv1d, ConvTranspose1d)"
    else:
        model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3))
        reason = "with a module that K-FAC does not take"
    model[1].weight = model[0].weight
    rows = KFAC(model, lr=0.1).summary()
    assert rows[0].treatment == "fallback"
    assert reason in rows[0].reason


# --- the nearest Kronecker product -----------------------------------------------------------


def spd(size: int, diagonal: bool = False) -> Tensor:
    if diagonal:
        return torch.rand(size, dtype=torch.float64)
    root = randn(size, size)
    return root @ root.T


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_nearest_kronecker_is_the_truncated_decomposition(count: int, diagonal: bool) -> None:
    torch.manual_seed(count)
    pairs = [(spd(4, diagonal) * 10**i, spd(3)) for i in range(count)]
    rearranged = sum(torch.outer(a.flatten(), g.flatten()) for a, g in pairs)
    u, s, vt = torch.linalg.svd(rearranged)
    a, g = nearest_kronecker(pairs)
    close(torch.outer(a.flatten(), g.flatten()), s[0] * torch.outer(u[:, 0], vt[0]))
    assert (a.min() >= 0) if diagonal else (torch.linalg.eigvalsh(a).min() >= -1e-12)


def test_nearest_kronecker_of_zeros_is_zero() -> None:
    zero = torch.zeros(2, 2)
    for found in nearest_kronecker([(zero, zero), (zero, zero)]):
        assert torch.equal(found, zero)
    a, g = spd(2), spd(3)
    found = nearest_kronecker([(torch.zeros_like(a), torch.zeros_like(g)), (a, g)])
    close(torch.kron(*found), torch.kron(a, g))


# --- an embedding that is also the output layer ------------------------------------------------


class Predicting(nn.Module):
    """Tokens [N, T] to logits of the next ones, by one table."""

    def __init__(self, bias: bool = False, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.table.weight
        else:
            self.head.weight = nn.Parameter(self.table.weight.detach().clone())
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.table(tokens)).tanh()).transpose(1, 2)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, VOCABULARY, (5, 5), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("max_factor_dim", [100, VOCABULARY - 1])
def test_a_tied_table_is_solved_with_the_kronecker_product_nearest_to_both_uses(
    bias: bool, max_factor_dim: int
) -> None:
    chosen = {"fisher": "type-2", "max_factor_dim": max_factor_dim}
    data, criterion = tokens(), nn.CrossEntropyLoss()
    untied = Predicting(bias, tied=False)
    reference = train(copy.deepcopy(untied), data, criterion, **chosen)
    frequencies, on_features = (f[0] for f in reference.factor("table"))
    a, g = (f[0] for f in reference.factor("head"))
    if g.dim() == 1:
        g = g.diag()
    padded = torch.zeros_like(a)
    padded[:WIDTH, :WIDTH] = on_features
    total = torch.outer(a.flatten(), g.flatten())
    total += torch.outer(padded.flatten(), frequencies.diag().flatten())
    u, s, vt = torch.linalg.svd(total)
    a, g = s[0] * u[:, 0].view_as(a), vt[0].view_as(g)

    model = Predicting(bias)
    loss = criterion(model(data[0]), data[1])
    parameters = [model.head.weight, *([model.head.bias] if bias else [])]
    gradient, *bias_gradient = torch.autograd.grad(loss, parameters)
    if bias:
        gradient = torch.cat([gradient, bias_gradient[0][:, None]], dim=1)
    expected = oracles.solve_exact_damping(a[None], g[None], DAMPING, gradient[None])[0]
    before = [p.detach().clone() for p in parameters]
    train(model, data, criterion, **chosen)
    found = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    close(found[0], -expected[:, :WIDTH])
    if bias:
        close(found[1], -expected[:, WIDTH])


def test_a_table_of_which_only_one_use_runs_has_the_factors_of_that_use() -> None:
    class Half(Predicting):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(self.table(tokens)).transpose(1, 2)

    data = tokens()[0], tokens()[1] % WIDTH
    steps = []
    for tied in (True, False):
        model = Half(tied=tied)
        train(model, data, nn.CrossEntropyLoss(), fisher="type-2", steps=2)
        steps.append(model.table.weight.detach())
    close(*steps)


def test_the_summary_shows_one_block() -> None:
    rows = {r.parameter: r for r in KFAC(Predicting(), lr=0.1).summary()}
    assert rows["table.weight"].factors == "A 1×4×4, G 1×6×6"
    assert rows["table.weight"].reason == "one block with head"
    assert "head.weight" not in rows


@pytest.mark.promise("a weight shared by several modules")
def test_forward_only_leaves_it_to_the_fallback() -> None:
    row = KFAC(Predicting(), lr=0.1, fisher="forward-only").summary()[0]
    assert row.treatment == "fallback"
    assert "in different ways" in row.reason


def test_a_resumed_run_continues_bit_for_bit() -> None:
    settings = {"fisher": "mc", "lr": 0.1, "momentum": 0.9}
    data, criterion = tokens(), nn.CrossEntropyLoss()
    straight = Predicting()
    train(straight, data, criterion, steps=4, **settings)
    model = Predicting()
    saved = copy.deepcopy(train(model, data, criterion, steps=2, **settings).state_dict())
    resumed = KFAC(model, **PLAIN | settings | {"criterion": criterion})
    resumed.load_state_dict(saved)
    for _ in range(2):
        resumed.zero_grad()
        criterion(model(data[0]), data[1]).backward()
        resumed.step()
    for p, q in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_memory_counts_the_factors_of_both_uses() -> None:
    one = KFAC(Predicting(tied=False), lr=0.1).memory_estimate()
    both = KFAC(Predicting(), lr=0.1).memory_estimate()
    assert both["factors"] == one["factors"]
    assert both["inverses"] < one["inverses"]


# --- mutants -----------------------------------------------------------------------------------


def last_use_wins(
    original: Callable, bucket: Bucket, index: int, name: str, moment: Tensor, rows: int = 0
) -> None:
    bucket.pending[name][index] = 0
    if name == "A":
        bucket.rows[index] = 0
    original(bucket, index, name, moment, rows)


def plain_sums(original: Callable, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return sum(a for a, _ in pairs), sum(g for _, g in pairs)


MUTANTS: dict[str, tuple[Callable, Callable]] = {
    "last use wins": (
        replace(Bucket, "accumulate", last_use_wins),
        test_a_weight_tied_along_independent_paths_is_exact,
    ),
    "the transposed use is ignored": (
        replace(
            Curvature,
            "_merged",
            lambda original, self, bucket: (bucket.kronecker_factors, bucket.weight),
        ),
        partial(
            test_a_tied_table_is_solved_with_the_kronecker_product_nearest_to_both_uses, False, 100
        ),
    ),
    "factors of both uses are added": (
        replace(kfac.curvature, "nearest_kronecker", plain_sums),
        partial(
            test_a_tied_table_is_solved_with_the_kronecker_product_nearest_to_both_uses, True, 100
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = MUTANTS[mutant]
    test()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test()
