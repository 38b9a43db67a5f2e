"""EKFAC: the diagonal of the exact Fisher in K-FAC's eigenbasis, measured example by example."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from mutants import replace
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import kfac.example_gradients
import kfac.layers.base
from kfac import KFAC, Preconditioner
from kfac.curvature import Curvature
from kfac.example_gradients import (
    Basis,
    by_rotated_gradients,
    by_rotated_rows,
    squared_gradients,
)
from kfac.factors import Bucket
from kfac.inverse import Ekfac

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
DAMPING, CLASSES = 0.1, 3
SETTINGS: dict[str, Any] = {
    "damping": DAMPING, "inverse": "ekfac", "factor_decay": 0.0,
    "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- the two contractions --------------------------------------------------------------------


def orthogonal(groups: int, size: int) -> Tensor:
    return torch.linalg.qr(randn(groups, size, size)).Q


@pytest.mark.parametrize("positions", [1, 2, 7])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dense", ["both", "a", "g", "none"])
@pytest.mark.parametrize("chunk", [1, 2**23])
def test_both_contractions_are_the_squares_written_out(
    positions: int, groups: int, dense: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(kfac.example_gradients, "_CHUNK_ELEMENTS", chunk)
    a, g = randn(5, positions, groups, 4), randn(5, positions, groups, 3)
    q_a = orthogonal(groups, 4) if dense in ("both", "a") else None
    q_g = orthogonal(groups, 3) if dense in ("both", "g") else None
    expected = torch.zeros(groups, 3, 4, dtype=torch.float64)
    for example in range(5):
        for group in range(groups):
            total = sum(
                torch.outer(g[example, t, group], a[example, t, group]) for t in range(positions)
            )
            total = total if q_a is None else total @ q_a[group]
            total = total if q_g is None else q_g[group].T @ total
            expected[group] += total**2
    for contract in (by_rotated_rows, by_rotated_gradients, squared_gradients):
        close(contract(a, g, Basis(q_a, q_g)), expected)


@pytest.mark.parametrize(("positions", "expected"), [(1, "rows"), (100, "gradients")])
def test_the_cheaper_contraction_is_taken(
    positions: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("rows", "gradients"):
        monkeypatch.setattr(
            kfac.example_gradients, f"by_rotated_{name}", lambda *_, name=name: taken.append(name)
        )
    basis = Basis(orthogonal(1, 6), orthogonal(1, 5))
    squared_gradients(randn(2, positions, 1, 6), randn(2, positions, 1, 5), basis)
    assert taken == [expected]


# --- nets ------------------------------------------------------------------------------------


class Repeated(nn.Module):
    """A layer that is called twice, and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.body(x).tanh()).tanh().mean(1))


class Pooled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


def small(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), small(6, 5)
    ),
    "without bias": lambda: (
        nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES)),
        small(6, 5),
    ),
    "sequences": lambda: (
        Pooled(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES), nn.Softplus()),
        small(6, 3, 5),
    ),
    "long sequences": lambda: (
        Pooled(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES), nn.Softplus()),
        small(4, 20, 3),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2, stride=2), nn.Tanh(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
        ),
        small(5, 2, 5, 5),
    ),
    "groups": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, CLASSES),
        ),
        small(5, 4, 4, 4),
    ),
    "a module called twice": lambda: (Repeated(), small(5, 2, 4)),
}  # fmt: skip


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = NETS[name]()
    return model.double(), x, torch.arange(len(x)) % CLASSES


def preconditioned(
    model: nn.Module, x: Tensor, target: Tensor, criterion: nn.Module, steps: int = 2, **chosen: Any
) -> tuple[Preconditioner, dict[str, Tensor]]:
    """Some steps on one batch at fixed parameters; the last one's preconditioned gradients."""
    if chosen.get("fisher") != "empirical":
        chosen = {"fisher": "type-2"} | chosen | {"criterion": criterion}
    preconditioner = Preconditioner(model, **SETTINGS | chosen)
    for _ in range(steps):
        model.zero_grad()
        criterion(model(x), target).backward()
        preconditioner.step()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return preconditioner, gradients


def eigenbasis(preconditioner: Preconditioner, layer: str) -> Tensor:
    """Q_G ⊗ Q_A per group, as columns ``[groups, p, p]``."""
    vectors = [torch.linalg.eigh(factor).eigenvectors for factor in preconditioner.factor(layer)]
    return oracles.kronecker(*vectors)


def check_against_the_dense_fisher(name: str, sharing: str) -> None:
    model, x, target = problem(name)
    criterion = nn.CrossEntropyLoss()
    reference = copy.deepcopy(model)
    preconditioner, found = preconditioned(model, x, target, criterion, weight_sharing=sharing)
    blocks = oracles.parameter_blocks(reference, oracles.gradients(reference, x, target, criterion))
    steps = oracles.parameter_blocks(model, found)
    for layer, gradient in blocks.items():
        fisher = oracles.ggn_blocks(reference, layer, x, target, criterion)
        q = eigenbasis(preconditioner, layer)
        diagonal = (q.mT @ fisher @ q).diagonal(dim1=1, dim2=2)
        rotated = (q.mT @ gradient.flatten(1)[..., None])[..., 0]
        expected = (q @ (rotated / (diagonal + DAMPING))[..., None])[..., 0]
        close(steps[layer], expected.view_as(gradient))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NETS)
def test_it_equals_the_dense_form(name: str, sharing: str) -> None:
    check_against_the_dense_fisher(name, sharing)


@pytest.mark.parametrize("name", ["linear", "sequences", "convolutions", "a module called twice"])
def test_empirical_second_moments_are_those_of_each_example(name: str) -> None:
    model, x, target = problem(name)
    criterion = nn.CrossEntropyLoss()
    reference = copy.deepcopy(model)
    preconditioner, found = preconditioned(model, x, target, criterion, fisher="empirical")

    def loss(values: Mapping[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(reference, values, (one[None],)), label[None])

    values = {name: p.detach() for name, p in reference.named_parameters()}
    by_example = vmap(grad(loss), in_dims=(None, 0, 0))(values, x, target)
    mean = oracles.parameter_blocks(reference, {n: g.mean(0) for n, g in by_example.items()})
    steps = oracles.parameter_blocks(model, found)
    for layer, gradient in mean.items():
        q = eigenbasis(preconditioner, layer)
        second = 0
        for i in range(len(x)):
            one = oracles.parameter_blocks(reference, {n: g[i] for n, g in by_example.items()})
            second = second + (q.mT @ one[layer].flatten(1)[..., None])[..., 0] ** 2 / len(x)
        rotated = (q.mT @ gradient.flatten(1)[..., None])[..., 0]
        expected = (q @ (rotated / (second + DAMPING))[..., None])[..., 0]
        close(steps[layer], expected.view_as(gradient))


def matrices(name: str, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per layer the Fisher, K-FAC's and EKFAC's approximation of it, and EKFAC's eigenbasis."""
    model, x, target = problem(name)
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    criterion = nn.CrossEntropyLoss()
    reference = copy.deepcopy(model)
    preconditioner, _ = preconditioned(model, x, target, criterion)
    kronecker, _ = preconditioned(model, x, target, criterion, inverse="eigen")
    ours, theirs = preconditioner.curvature(), kronecker.curvature()
    return {
        layer: (
            oracles.ggn_blocks(reference, layer, x, target, criterion),
            oracles.kronecker(*kronecker.factor(layer)),
            ours[layer].to_dense(),
            eigenbasis(preconditioner, layer),
        )
        for layer in theirs
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["sequences", "convolutions", "a module called twice"])
def test_ekfac_is_nearer_to_the_fisher_than_kfac_and_optimal_in_its_basis(
    name: str, seed: int
) -> None:
    improved = 0
    for fisher, kfac_matrix, _, q in matrices(name, seed).values():
        diagonal = (q.mT @ fisher @ q).diagonal(dim1=1, dim2=2)
        ekfac_matrix = q @ torch.diag_embed(diagonal) @ q.mT
        distance = (fisher - ekfac_matrix).norm()
        assert distance <= (fisher - kfac_matrix).norm() * (1 + 1e-12)
        improved += bool(distance < 0.99 * (fisher - kfac_matrix).norm())
        for index in range(0, diagonal.shape[1], 7):
            for change in (0.9, 1.1):
                perturbed = diagonal.clone()
                perturbed[:, index] = perturbed[:, index] * change + 1e-6 * (change - 1)
                moved = q @ torch.diag_embed(perturbed) @ q.mT
                assert (fisher - moved).norm() > distance
    assert improved


def test_curvature_shows_the_measured_eigenvalues() -> None:
    for fisher, _, ekfac_matrix, q in matrices("linear", 0).values():
        diagonal = (q.mT @ fisher @ q).diagonal(dim1=1, dim2=2)
        expected = (q @ torch.diag_embed(diagonal) @ q.mT)[0]
        found = ekfac_matrix
        # to_dense has the order of the parameters: the bias last, not in each row.
        close(found.trace(), expected.trace())
        close(found.norm(), expected.norm())


def test_it_is_no_mere_name_for_something_else() -> None:
    model, x, target = problem("sequences")
    criterion = nn.CrossEntropyLoss()
    raw = oracles.gradients(model, x, target, criterion)
    found = {
        inverse: preconditioned(copy.deepcopy(model), x, target, criterion, inverse=inverse)[1]
        for inverse in ("ekfac", "eigen")
    }
    for other in (raw, found["eigen"]):
        assert not torch.allclose(found["ekfac"]["0.weight"], other["0.weight"], rtol=1e-2)


# --- over steps ------------------------------------------------------------------------------


def test_the_first_step_has_the_eigenvalues_of_kfac() -> None:
    model, x, target = problem("convolutions")
    criterion = nn.CrossEntropyLoss()
    first = [
        preconditioned(copy.deepcopy(model), x, target, criterion, steps=1, inverse=inverse)[1]
        for inverse in ("ekfac", "eigen")
    ]
    for name, found in first[0].items():
        close(found, first[1][name])


def test_a_refresh_takes_second_moments_to_the_new_basis() -> None:
    torch.manual_seed(0)
    old = {"A_eigenvectors": orthogonal(2, 4)[None], "G_eigenvectors": orthogonal(2, 3)[None]}
    new = {"A_eigenvectors": orthogonal(2, 4)[None], "G_eigenvectors": orthogonal(2, 3)[None]}
    moments = torch.rand(1, 2, 3, 4, dtype=torch.float64)
    found = Ekfac().moved_second_moments(moments, old, new)
    for group in range(2):
        q_old, q_new = (
            torch.kron(s["G_eigenvectors"][0, group], s["A_eigenvectors"][0, group])
            for s in (old, new)
        )
        dense = q_old @ moments[0, group].flatten().diag() @ q_old.T
        close(found[0, group].flatten(), (q_new.T @ dense @ q_new).diagonal())
    close(found.sum(), moments.sum())


def test_second_moments_are_averaged_between_refreshes() -> None:
    """The share of each batch is its share of A and of G, the first's by its Kronecker product."""
    model, x, target = problem("linear")
    criterion = nn.CrossEntropyLoss()
    settings = SETTINGS | {"factor_decay": 0.5, "inverse_update_period": 100}
    preconditioner = Preconditioner(model, **settings, criterion=criterion, fisher="type-2")
    reference = copy.deepcopy(model)
    for some in (slice(0, 3), slice(3, 6)):
        model.zero_grad()
        criterion(model(x[some]), target[some]).backward()
        preconditioner.step()
        if some.start == 0:
            a, g = preconditioner.factor("0")
            q = eigenbasis(preconditioner, "0")
    data = x[3:], target[3:], criterion
    fisher = oracles.ggn_blocks(reference, "0", *data)
    diagonal = (q.mT @ fisher @ q).diagonal(dim1=1, dim2=2)
    first = (q.mT @ oracles.kronecker(a, g) @ q).diagonal(dim1=1, dim2=2)
    expected = (0.5 * first + diagonal) / 1.5
    gradient = oracles.parameter_blocks(reference, oracles.gradients(reference, *data))["0"]
    rotated = (q.mT @ gradient.flatten(1)[..., None])[..., 0]
    step = (q @ (rotated / (expected + DAMPING))[..., None])[..., 0]
    found = oracles.parameter_blocks(model, {n: p.grad for n, p in model.named_parameters()})["0"]
    close(found, step.view_as(gradient))


def test_a_resumed_run_continues_bit_for_bit() -> None:
    model, x, target = problem("convolutions")
    criterion = nn.CrossEntropyLoss()
    settings = SETTINGS | {"lr": 0.1, "criterion": criterion, "inverse_update_period": 3}
    settings |= {"factor_decay": 0.9}

    def run(model: nn.Module, optimizer: KFAC, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(x), target).backward()
            optimizer.step()

    straight, resumed = copy.deepcopy(model), copy.deepcopy(model)
    run(straight, KFAC(straight, **settings), 8)
    optimizer = KFAC(resumed, **settings)
    run(resumed, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = KFAC(resumed, **settings)
    optimizer.load_state_dict(saved)
    run(resumed, optimizer, 4)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


# --- layers with ways of their own -----------------------------------------------------------


class Looked(nn.Module):
    """Tokens [N, T] to logits; a table's input is never formed."""

    def __init__(self, multiply: bool, tied: bool = False, repeat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        table = nn.Embedding(5, 4, padding_idx=None if tied else 0)
        nn.init.normal_(table.weight)
        self.head = nn.Linear(4, 5)
        self.repeat = repeat
        if tied:
            self.head.weight = table.weight
        self.table = table
        if multiply:
            self.table = nn.Linear(5, 4, bias=False)
            weight = table.weight.detach().T.clone()
            self.table.weight = nn.Parameter(weight)
        self.double()

    def look(self, tokens: Tensor) -> Tensor:
        if isinstance(self.table, nn.Embedding):
            return self.table(tokens)
        hot = F.one_hot(tokens, 5).double()
        hot[..., 0] = 0
        return self.table(hot)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.look(tokens)
        if self.repeat:
            x = x + self.look(tokens.flip(0)).tanh()
        return self.head(x.tanh().mean(1))


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_a_table_is_a_linear_layer_with_a_diagonal_a(fisher: str, repeat: bool) -> None:
    tokens = torch.tensor([[0, 1, 1, 2], [3, 3, 3, 3], [0, 0, 4, 1]])
    target, criterion = torch.arange(3), nn.CrossEntropyLoss()
    found = []
    for multiply in (False, True):
        model = Looked(multiply, repeat=repeat)
        if not multiply:
            model.table.weight.data[0] = 0
        else:
            model.table.weight.data[:, 0] = 0
        _, gradients = preconditioned(
            model, tokens, target, criterion, fisher=fisher, max_factor_dim=4
        )
        weight = gradients["table.weight"]
        found.append(weight.T if multiply else weight)
    close(*found)


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("max_factor_dim", [4, 100])
def test_a_tied_table_sums_the_gradients_of_both_uses(max_factor_dim: int) -> None:
    tokens = torch.tensor([[0, 1, 1, 2], [3, 3, 3, 3], [0, 0, 4, 1]])
    target, criterion = torch.arange(3), nn.CrossEntropyLoss()
    model = Looked(multiply=False, tied=True)
    reference = copy.deepcopy(model)
    preconditioner, found = preconditioned(
        model, tokens, target, criterion, fisher="empirical", max_factor_dim=max_factor_dim
    )

    def loss(values: Mapping[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(reference, values, (one[None],)), label[None])

    values = {"head.weight": reference.head.weight, "head.bias": reference.head.bias}
    values = {name: p.detach() for name, p in values.items()}
    by_example = vmap(grad(loss), in_dims=(None, 0, 0))(values, tokens, target)
    matrix = torch.cat([by_example["head.weight"], by_example["head.bias"][..., None]], dim=-1)
    a, g = (f[0] for f in preconditioner.factor("head"))
    q_a, q_g = (
        torch.linalg.eigh(f).eigenvectors if f.dim() == 2 else torch.eye(5).double() for f in (a, g)
    )
    second = (q_g.T @ matrix @ q_a).square().mean(0)
    expected = q_g @ ((q_g.T @ matrix.mean(0) @ q_a) / (second + DAMPING)) @ q_a.T
    close(found["head.weight"], expected[:, :-1])
    close(found["head.bias"], expected[:, -1])


def test_attention_and_norm_layers_train() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimizer = KFAC(model, lr=0.05, inverse="ekfac", factor_update_period=1)
    x, losses = torch.randn(4, 5, 8), []
    target = torch.randn(4, 5, 8)
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    second = optimizer.state_dict()["kfac"]["layers"]
    for name in ("self_attn.q_proj", "self_attn.out_proj", "norm1", "linear1"):
        assert second[name]["factors"]["S"].sum() > 0


def test_forward_only_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cholesky', .*'inverse-free' with"):
        KFAC(nn.Linear(2, 2), lr=0.1, inverse="ekfac", fisher="forward-only")


# --- mutants ---------------------------------------------------------------------------------


def squares_of_rows(original: Callable, inputs: Tensor, gradients: Tensor, basis: Basis) -> Tensor:
    """Every position for itself: cross terms between positions lost."""
    rows = (r.flatten(0, 1).unsqueeze(1) for r in (inputs, gradients))
    return original(*rows, basis)


def permuted(original: Callable, self: Curvature, block: str) -> Basis | None:
    """The eigenbasis in another order than the second moments."""
    basis = original(self, block)
    return None if basis is None else Basis(basis.a.flip(-1), basis.g)


MUTANTS: dict[str, tuple[Callable, Callable]] = {
    "silently the raw gradient": (
        replace(Ekfac, "precondition", lambda original, self, state, gradient, damping: gradient),
        partial(check_against_the_dense_fisher, "linear", "expand"),
    ),
    "silently K-FAC": (
        replace(
            Ekfac,
            "eigenvalues",
            lambda original, self, state: (
                state["G_eigenvalues"].unsqueeze(-1) * state["A_eigenvalues"].unsqueeze(-2)
            ),
        ),
        test_it_is_no_mere_name_for_something_else,
    ),
    "squares of positions": (
        replace(kfac.layers.base, "squared_gradients", squares_of_rows),
        partial(check_against_the_dense_fisher, "sequences", "expand"),
    ),
    "basis sorted, second moments not": (
        replace(Curvature, "basis", permuted),
        partial(check_against_the_dense_fisher, "linear", "expand"),
    ),
    "second moments not divided by the number of terms": (
        replace(
            Bucket,
            "normalize",
            lambda original, self, scale: (
                self.pending["S"].div_(scale.to(self.pending["S"])) * 0,
                original(self, scale),
            )[1],
        ),
        partial(check_against_the_dense_fisher, "linear", "expand"),
    ),
    "second moments left in the old basis": (
        replace(Ekfac, "moved_second_moments", lambda original, self, moments, old, new: moments),
        test_a_refresh_takes_second_moments_to_the_new_basis,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = MUTANTS[mutant]
    test()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test()
