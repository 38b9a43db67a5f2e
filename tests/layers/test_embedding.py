"""An embedding is a linear layer on one-hot inputs, without ever forming them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac import KFAC

VOCABULARY, WIDTH = 7, 3


class Looked(nn.Module):
    """Tokens [N, T] to logits by an embedding."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH, **settings)
        self.head = nn.Linear(WIDTH, 4)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh().mean(1))


class Multiplied(Looked):
    """The same net with a linear layer on one-hot inputs in place of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        table = nn.Linear(VOCABULARY, WIDTH, bias=False)
        table.weight.data = self.table.weight.data.T.clone()
        self.table = table

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table(F.one_hot(tokens, VOCABULARY).to(self.table.weight.dtype))


def moved(model: nn.Module, **settings: Any) -> Tensor:
    """The table after two steps, as [VOCABULARY, WIDTH]."""
    model, criterion = model.double(), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, criterion=criterion,
        fisher="type-2", factor_update_period=1, inverse_update_period=1, **settings,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        tokens = torch.randint(0, VOCABULARY, (5, 4), generator=generator)
        optimizer.zero_grad()
        criterion(model(tokens), torch.arange(5) % 4).backward()
        optimizer.step()
    weight = model.table.weight.detach()
    return weight if isinstance(model.table, nn.Embedding) else weight.T


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_an_embedding_steps_like_the_linear_layer_on_one_hot_inputs(inverse: Any) -> None:
    expected = moved(Multiplied(), inverse=inverse)
    torch.testing.assert_close(moved(Looked(), inverse=inverse), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_under_reduce_it_keeps_the_diagonal_of_that_layer(inverse: Any) -> None:
    settings = {"inverse": inverse, "weight_sharing": "reduce"}
    expected = moved(Multiplied(), max_factor_dim=VOCABULARY - 1, **settings)
    found = moved(Looked(), **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.promise("`nn.Embedding`")
def test_a_holds_the_frequencies_of_the_tokens() -> None:
    model = Looked()
    optimizer = KFAC(model, lr=0.1)
    tokens = torch.tensor([[0, 0, 1, 6], [0, 1, 1, 2]])
    model(tokens).square().mean().backward()
    optimizer.step()
    expected = torch.tensor([[3, 3, 1, 0, 0, 0, 1]]) / 8
    torch.testing.assert_close(optimizer.factor("table")[0], expected)


@pytest.mark.promise("`nn.Embedding`")
def test_padding_counts_as_an_input_of_zeros_and_its_row_stays() -> None:
    model = Looked(padding_idx=0)
    before = model.table.weight.detach().clone()
    optimizer = KFAC(model, lr=0.1)
    model(torch.tensor([[0, 0, 1, 6], [0, 1, 1, 2]])).square().mean().backward()
    optimizer.step()
    expected = torch.tensor([[0, 3, 1, 0, 0, 0, 1]]) / 8
    torch.testing.assert_close(optimizer.factor("table")[0], expected)
    assert torch.equal(model.table.weight[0], before[0])
    assert not torch.equal(model.table.weight[1], before[1])


def test_a_large_vocabulary_needs_no_square_factor() -> None:
    model = nn.Embedding(50_000, 8)
    optimizer = KFAC(model, lr=0.1)
    assert optimizer.summary()[0].factors == "A 1×50000, G 1×8×8"
    assert optimizer.memory_estimate()["factors"] == 4 * (50_000 + 64)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_tokens_may_have_any_shape(shape: tuple[int, ...]) -> None:
    model = nn.Embedding(VOCABULARY, WIDTH)
    optimizer = KFAC(model, lr=0.1, loss_terms=1)
    model(torch.zeros(shape, dtype=torch.int32)).square().mean().backward()
    optimizer.step()
    assert optimizer.factor("")[0][0].tolist() == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.promise("`nn.Embedding`")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"scale_grad_by_freq": True}, "scale_grad_by_freq")],
)
def test_embeddings_with_other_gradients_go_to_the_fallback(
    settings: dict[str, Any], reason: str
) -> None:
    row = KFAC(Looked(**settings), lr=0.1).summary()[0]
    assert row.treatment == "fallback"
    assert reason in row.reason


@pytest.mark.parametrize("mutant", ["rows transposed", "padding counted"])
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfac.layers.embedding import EmbeddingLayer

    if mutant == "rows transposed":
        wrong = lambda self, matrix: [matrix[0].reshape(VOCABULARY, WIDTH)]  # noqa: E731
        monkeypatch.setattr(EmbeddingLayer, "unmatrix", wrong)
        with pytest.raises(AssertionError):
            test_an_embedding_steps_like_the_linear_layer_on_one_hot_inputs("eigen")
    else:
        counts = EmbeddingLayer._counts

        def with_padding(self: EmbeddingLayer, tokens: Tensor) -> Tensor:
            padding, self.module.padding_idx = self.module.padding_idx, None
            result = counts(self, tokens)
            self.module.padding_idx = padding
            return result

        monkeypatch.setattr(EmbeddingLayer, "_counts", with_padding)
        with pytest.raises(AssertionError):
            test_padding_counts_as_an_input_of_zeros_and_its_row_stays()
