"""An embedding bag is a linear layer on vectors of token counts; of its A the diagonal is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import KFAC, Preconditioner
from kfac.layers.embedding import EmbeddingBagLayer

pytestmark = pytest.mark.usefixtures("no_blocks")

VOCABULARY, WIDTH = 7, 3
# Bags of unequal length; one is empty, and so is the last one.
TOKENS = torch.tensor([0, 3, 3, 6, 2, 2, 2, 5, 0, 1])
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 10])
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 3.0, 0.25, 1.5, -0.5, 1.0, 2.0, -3.0]).double()
Call = Callable[[nn.EmbeddingBag], Tensor]

CALLS: dict[str, tuple[dict[str, Any], Call]] = {
    "rows": ({}, lambda bag: bag(TOKENS.reshape(5, 2))),
    "offsets": ({}, lambda bag: bag(TOKENS, OFFSETS)),
    "offsets by name": ({}, lambda bag: bag(offsets=OFFSETS, input=TOKENS)),
    "narrow integers": ({}, lambda bag: bag(TOKENS.int(), OFFSETS.int())),
    "last offset": (
        {"include_last_offset": True},
        lambda bag: bag(TOKENS, torch.cat([OFFSETS, torch.tensor([len(TOKENS)])])),
    ),
    "padding in rows": ({"padding_idx": 2}, lambda bag: bag(TOKENS.reshape(5, 2))),
    "padding with offsets": ({"padding_idx": -7}, lambda bag: bag(TOKENS, OFFSETS)),
}
WEIGHTED_CALLS: dict[str, tuple[dict[str, Any], Call]] = {
    "weighted rows": ({}, lambda bag: bag(TOKENS.reshape(5, 2), None, WEIGHTS.reshape(5, 2))),
    "weighted, with offsets": ({}, lambda bag: bag(TOKENS, OFFSETS, WEIGHTS)),
    "weighted, by name": (
        {},
        lambda bag: bag(TOKENS, offsets=OFFSETS, per_sample_weights=WEIGHTS),
    ),
    "weighted, with padding": ({"padding_idx": 3}, lambda bag: bag(TOKENS, OFFSETS, WEIGHTS)),
    "weights that are trained": (
        {"padding_idx": 3},
        lambda bag: bag(TOKENS, OFFSETS, WEIGHTS.clone().requires_grad_()),
    ),
}
CASES = [(form, mode) for form in CALLS for mode in ("sum", "mean")]
CASES += [(form, "sum") for form in WEIGHTED_CALLS]


class Bagged(nn.Module):
    """Bags of tokens to logits by a linear layer on dense vectors, or by an embedding bag."""

    def __init__(self, form: str, mode: str, *, dense: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings, self.call = (CALLS | WEIGHTED_CALLS)[form]
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, mode=mode, **settings)
        self.table = self.bag
        self.head = nn.Linear(WIDTH, 4)
        self.double()
        if dense:
            self.vectors = self.dense_vectors()
            self.table = nn.Linear(VOCABULARY, WIDTH, bias=False)
            self.table.weight.data = self.bag.weight.data.T.clone()
            del self.bag

    def dense_vectors(self) -> Tensor:
        """What the bag computes where the table is the identity: its own coefficients."""
        same = nn.EmbeddingBag.from_pretrained(
            torch.eye(VOCABULARY).double(),
            mode=self.bag.mode,
            padding_idx=self.bag.padding_idx,
            include_last_offset=self.bag.include_last_offset,
        )
        return self.call(same).detach()

    def forward(self, batch: Tensor) -> Tensor:
        table = self.table
        embedded = table(self.vectors) if isinstance(table, nn.Linear) else self.call(table)
        # Fewer examples than bags: the bags of an example are its positions.
        return self.head(embedded.tanh()).reshape(len(batch), -1, 4).mean(1)


def trained(model: Bagged, examples: int, **settings: Any) -> list[Tensor]:
    """The diagonal of A, G and the table as [VOCABULARY, WIDTH] after two steps."""
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, criterion=criterion,
        fisher="type-2", factor_update_period=1, inverse_update_period=1,
        max_factor_dim=VOCABULARY - 1, **settings,
    )  # fmt: skip
    for step in range(2):
        optimizer.zero_grad()
        target = (torch.arange(examples) + step) % 4
        criterion(model(torch.zeros(examples)), target).backward()
        optimizer.step()
    assert optimizer.summary()[0].treatment == "kfac"
    a, g = optimizer.factor("table" if isinstance(model.table, nn.Linear) else "bag")
    weight = model.table.weight.detach()
    return [a, g, weight.T if isinstance(model.table, nn.Linear) else weight]


def bags(form: str) -> int:
    return 5 if "rows" in form else 6


def assert_equal_to_dense(form: str, mode: str, examples: int, **settings: Any) -> None:
    expected = trained(Bagged(form, mode, dense=True), examples, **settings)
    found = trained(Bagged(form, mode, dense=False), examples, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.promise("`nn.EmbeddingBag`")
@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
@pytest.mark.parametrize(("form", "mode"), CASES)
def test_it_steps_like_the_linear_layer_on_bag_vectors(form: str, mode: str, inverse: Any) -> None:
    assert_equal_to_dense(form, mode, bags(form), inverse=inverse)


@pytest.mark.parametrize("examples", [1, 2, 6])
@pytest.mark.parametrize(("form", "mode"), [c for c in CASES if bags(c[0]) == 6])
def test_under_reduce_the_bags_of_an_example_are_averaged(
    form: str, mode: str, examples: int
) -> None:
    assert_equal_to_dense(form, mode, examples, weight_sharing="reduce")


def test_a_holds_squared_coefficients_per_bag() -> None:
    tokens = torch.tensor([[0, 0, 1, 6], [0, 1, 1, 2]])
    for mode, count in (("sum", 1), ("mean", 4)):
        model = nn.EmbeddingBag(VOCABULARY, WIDTH, mode=mode)
        optimizer = KFAC(model, lr=0.1)
        model(tokens).square().mean().backward()
        optimizer.step()
        expected = torch.tensor([[5, 5, 1, 0, 0, 0, 1]]) / count**2 / 2
        torch.testing.assert_close(optimizer.factor("")[0], expected)


def test_rows_are_the_bag_vectors() -> None:
    model = Bagged("weighted, with padding", "sum", dense=False)
    layer = Preconditioner(model).layers[0]
    assert isinstance(layer, EmbeddingBagLayer)
    x = layer.observed((TOKENS,), {"offsets": OFFSETS, "per_sample_weights": WEIGHTS})
    assert layer.row_count(x) == layer.leading_size(x) == 6
    expected = model.dense_vectors()
    torch.testing.assert_close(layer.input_rows(x, 3), expected.reshape(3, 2, 1, VOCABULARY))
    torch.testing.assert_close(layer.input_moment(x), expected.square().sum(0, keepdim=True))


def test_padding_keeps_its_row() -> None:
    model = Bagged("padding in rows", "mean", dense=False)
    before = model.bag.weight.detach().clone()
    trained(model, 5)
    moved = (model.bag.weight != before).any(1)
    assert moved.tolist() == [True, True, False, True, False, True, True]


def test_bags_may_all_be_empty() -> None:
    model = nn.EmbeddingBag(VOCABULARY, WIDTH)
    before = model.weight.detach().clone()
    optimizer = KFAC(model, lr=0.1, loss_terms=1)
    model(torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert optimizer.factor("")[0].count_nonzero() == 0
    assert torch.equal(model.weight, before)


def test_a_large_vocabulary_needs_no_square_factor() -> None:
    model = nn.EmbeddingBag(50_000, 8)
    optimizer = KFAC(model, lr=0.1)
    assert optimizer.summary()[0].factors == "A 1×50000, G 1×8×8"
    assert optimizer.memory_estimate()["factors"] == 4 * (50_000 + 64)


@pytest.mark.promise("`nn.EmbeddingBag`")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "max"}, 'mode="max" is not linear'),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ],
)
def test_bags_that_are_no_linear_layer_go_to_the_fallback(
    settings: dict[str, Any], reason: str
) -> None:
    row = KFAC(nn.EmbeddingBag(VOCABULARY, WIDTH, **settings), lr=0.1).summary()[0]
    assert row.treatment == "fallback"
    assert reason in row.reason


def offsets_ignored(layer: EmbeddingBagLayer, tokens: Tensor, offsets: Tensor) -> Any:
    return torch.arange(len(tokens)) * len(offsets) // len(tokens), len(offsets)


def changed(**settings: Any) -> Callable[..., Tensor]:
    """The coefficients as if the module had other settings."""
    original = EmbeddingBagLayer._coefficients

    def coefficients(layer: EmbeddingBagLayer, *arguments: Any) -> Tensor:
        before = {name: getattr(layer.module, name) for name in settings}
        vars(layer.module).update(settings)
        result = original(layer, *arguments)
        vars(layer.module).update(before)
        return result

    return coefficients


def without_sample_weights(
    layer: EmbeddingBagLayer, tokens: Tensor, bags: Tensor, count: int, weights: Tensor
) -> Tensor:
    return torch.ones_like(weights).flatten()


def repetitions_apart(layer: EmbeddingBagLayer, x: Tensor) -> Tensor:
    """Σ c² over slots, where tokens that a bag repeats have to be added up first."""
    _, tokens, coefficients = layer.entries(x)
    return coefficients.new_zeros(1, VOCABULARY).index_add_(1, tokens, coefficients.square()[None])


@pytest.mark.parametrize(
    ("form", "mode", "method", "replacement"),
    [
        ("offsets", "sum", "_bags", offsets_ignored),
        ("offsets", "mean", "_coefficients", changed(mode="sum")),
        ("padding in rows", "sum", "_coefficients", changed(padding_idx=None)),
        ("padding in rows", "mean", "_coefficients", changed(padding_idx=None)),
        ("last offset", "sum", "_bags", offsets_ignored),
        ("weighted rows", "sum", "_coefficients", without_sample_weights),
        ("offsets", "sum", "input_moment", repetitions_apart),
    ],
    ids=[
        "offsets ignored",
        "mean not divided",
        "padding counted",
        "padding counted in the length",
        "last offset counted as a bag",
        "sample weights ignored",
        "repeated tokens not added up",
    ],
)
def test_mutants_are_caught(
    form: str, mode: str, method: str, replacement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbeddingBagLayer, method, replacement)
    with pytest.raises(AssertionError):
        assert_equal_to_dense(form, mode, bags(form))
