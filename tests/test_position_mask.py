"""Padded positions stay out of the statistics: a padded batch is as good as its sequences alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from mutants import replace
from torch import Tensor, nn

import kfac.statistics
from kfac import KFAC
from kfac.statistics import Statistics

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
VOCABULARY, WIDTH, CLASSES = 7, 4, 3
LENGTHS = [5, 2, 3, 4]
SETTINGS: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "damping": 0.1, "kl_clip": None, "factor_update_period": 1,
    "inverse_update_period": 1, "fisher": "type-2",
}  # fmt: skip


class Encoder(nn.Module):
    """Tokens [N, T] to logits [N, classes]; padding is attended to by nobody."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm, self.wide = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)
        self.back, self.head = nn.Linear(6, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES)
        self.flat = flat
        self.double()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        weight = torch.ones_like(tokens) if mask is None else mask
        x = self.table(tokens)
        y, _ = self.attention(x, x, x, key_padding_mask=weight == 0, need_weights=False)
        x = self.norm(x + y)
        if self.flat:
            x = self.back(self.wide(x.flatten(0, 1)).tanh()).view_as(x)
        else:
            x = self.back(self.wide(x).tanh())
        weight = weight.double().unsqueeze(-1)
        return self.head((x * weight).sum(1) / weight.sum(1))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return tokens, mask.long(), torch.arange(len(LENGTHS)) % CLASSES


def step_on_batch(by_name: bool = False, flat: bool = False, **settings: Any) -> Encoder:
    model, criterion = Encoder(flat), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **SETTINGS | settings)
    tokens, mask, target = batch()
    output = model(tokens, mask=mask) if by_name else model(tokens, mask)
    criterion(output, target).backward()
    optimizer.step()
    return model


def step_on_sequences(**settings: Any) -> Encoder:
    model, criterion = Encoder(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **SETTINGS | settings)
    tokens, _, target = batch()
    for i, length in enumerate(LENGTHS):
        loss = criterion(model(tokens[i : i + 1, :length]), target[i : i + 1])
        (loss / len(LENGTHS)).backward()
    optimizer.step()
    return model


def same(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        close(p, q, msg=name)


MASKS: dict[str, Any] = {"name": "mask", "function": lambda tokens, mask: mask}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
def test_a_padded_batch_steps_like_its_sequences_one_by_one(
    mask: str, sharing: str, fisher: str, inverse: str
) -> None:
    settings = {"weight_sharing": sharing, "fisher": fisher, "inverse": inverse}
    expected = step_on_sequences(**settings)
    same(step_on_batch(position_mask=MASKS[mask], **settings), expected)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_mask_is_found_however_it_is_passed(flat: bool, by_name: bool) -> None:
    same(step_on_batch(by_name, flat, position_mask="mask"), step_on_sequences())


def test_without_a_mask_padding_counts() -> None:
    with pytest.raises(AssertionError):
        same(step_on_batch(), step_on_sequences())


def test_batches_without_padding_need_no_mask() -> None:
    model, criterion = Encoder(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, position_mask="mask", **SETTINGS)
    criterion(model(batch()[0]), batch()[2]).backward()
    optimizer.step()
    a, _ = optimizer.factor("wide")
    close(a[0, -1, -1], torch.ones((), dtype=torch.float64))


def test_a_sequence_of_padding_only_is_no_division_by_zero() -> None:
    for sharing in ("expand", "reduce"):
        model, criterion = nn.Sequential(nn.Linear(3, 2), nn.Flatten()), nn.MSELoss()
        mask = torch.tensor([[1, 1], [0, 0]])
        optimizer = KFAC(
            model, criterion=criterion, weight_sharing=sharing, position_mask=lambda x, m=mask: m
        )
        criterion(model(torch.randn(2, 2, 3)), torch.zeros(2, 4)).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.promise("shapes, masks and outputs of a batch")
def test_a_mask_of_a_batch_that_was_given_up_is_forgotten() -> None:
    tokens, mask, target = batch()
    models = [Encoder(), Encoder()]
    for model, given_up in zip(models, (False, True), strict=True):
        criterion, masks = nn.CrossEntropyLoss(), [mask[:, 1:], None]
        optimizer = KFAC(
            model, criterion=criterion, position_mask=lambda *_, m=masks: m[0], **SETTINGS
        )
        if given_up:
            criterion(model(tokens, mask), target).backward()
            optimizer.zero_grad()
        masks.pop(0)
        criterion(model(tokens, mask), target).backward()
        optimizer.step()
    same(models[1], models[0])


@pytest.mark.promise("shapes, masks and outputs of a batch")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_head_on_pooled_features_needs_no_mask(sharing: str) -> None:
    models = [Encoder(), Encoder()]
    tokens, mask, target = batch()
    for model, given in zip(models, (None, "mask"), strict=True):
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        criterion = nn.CrossEntropyLoss()
        optimizer = KFAC(
            model, criterion=criterion, position_mask=given, weight_sharing=sharing, **SETTINGS
        )
        for _ in range(2):
            optimizer.zero_grad()
            criterion(model(tokens, mask), target).backward()
            optimizer.step()
    same(models[1], models[0])


@pytest.mark.promise("shapes, masks and outputs of a batch")
@pytest.mark.parametrize(
    "layer", [nn.Conv1d(5, 2, 1), nn.Linear(3, 2), nn.LayerNorm(3), nn.LayerNorm((5, 3))], ids=str
)
def test_a_layer_with_positions_needs_a_mask_of_them(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(4, 5, 3))
    optimizer = KFAC(model, fisher="empirical", position_mask=lambda x: torch.ones(4, 7))
    model(torch.randn(4, 5, 3)).square().mean().backward()
    with pytest.raises(ValueError, match=r"position_mask=.*like the input of a layer"):
        optimizer.step()


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"position_mask=.*'tokens', 'mask'.*'attention_mask'"):
        KFAC(Encoder(), position_mask="attention_mask")


def test_something_else_than_a_tensor_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, position_mask=lambda x: [1, 0])  # noqa: F841
    with pytest.raises(ValueError, match=r"position_mask=.*tensor"):
        model(torch.randn(2, 3))


MUTANTS: dict[str, Callable] = {
    "padding counted as rows": replace(
        Statistics,
        "_take_input",
        lambda original, self, layer, mask, x: (
            original(self, layer, mask, x)
            if mask is None
            else self.sink(
                layer.block, "A", layer.masked_moment(x, mask.flatten()), layer.row_count(x)
            )
        ),
    ),
    "mask ignored": replace(
        kfac.statistics,
        "_mask_of",
        lambda original, layer, record, x: (
            None if (mask := original(layer, record, x)) is None else torch.ones_like(mask)
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        test_a_padded_batch_steps_like_its_sequences_one_by_one(
            "name", "expand", "type-2", "cholesky"
        )
