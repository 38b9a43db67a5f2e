"""Hugging Face's ``Conv1D`` is a linear layer whose weight is transposed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kfac import KFAC
from kfac.layers.linear import TransposedLinearLayer

WIDTH = 4  # the second layer's weight is square, where a missing transpose changes no shape


class Net(nn.Module):
    """Inputs [N, 3] or [N, T, 3] to logits, or to their mean over positions."""

    def __init__(self, kind: type[nn.Module], *, mean: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, 5)]
        self.layers = nn.ModuleList(Conv1D(d_out, d_in) for d_in, d_out in sizes)
        for layer in self.layers:
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.weight, std=0.5)
        if kind is nn.Linear:
            self.layers = nn.ModuleList(as_linear(layer) for layer in self.layers)
        self.mean = mean
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        x = self.layers[-1](x)
        return x.mean(1) if self.mean and x.dim() == 3 else x.flatten(0, -2)


def as_linear(layer: Conv1D) -> nn.Linear:
    d_in, d_out = layer.weight.shape
    linear = nn.Linear(d_in, d_out)
    linear.weight.data = layer.weight.data.T.clone()
    linear.bias.data = layer.bias.data.clone()
    return linear


def results(model: Net, shape: tuple[int, ...], **settings: Any) -> list[Tensor]:
    """After two steps: every layer's A, G, weight as [outputs, inputs], and bias."""
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, criterion=criterion,
        fisher="type-2", factor_update_period=1, inverse_update_period=1, **settings,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        output = model(x)
        criterion(output, torch.arange(len(output)) % 5).backward()
        optimizer.step()
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, Conv1D)):
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            found += [*optimizer.factor(name), weight, layer.bias]
    assert optimizer.summary().fraction("fallback") == 0
    return [tensor.detach() for tensor in found]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.promise("`transformers.pytorch_utils.Conv1D`")
@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(6,), (6, 2)])
def test_it_steps_like_the_linear_layer_with_the_transposed_weight(
    shape: tuple[int, ...], weight_sharing: Any, inverse: Any
) -> None:
    settings = {"weight_sharing": weight_sharing, "inverse": inverse}
    mean = weight_sharing == "reduce"
    found = results(Net(Conv1D, mean=mean), shape, **settings)
    assert_equal(found, results(Net(nn.Linear, mean=mean), shape, **settings))


def test_a_bias_that_is_frozen_is_left_out() -> None:
    models = [Net(Conv1D), Net(nn.Linear)]
    for model in models:
        model.layers[1].bias.requires_grad_(False)
    found, expected = (results(model, (6,)) for model in models)
    assert_equal(found, expected)


def test_diagonal_factors() -> None:
    found, expected = (results(Net(k), (6,), max_factor_dim=3) for k in (Conv1D, nn.Linear))
    assert_equal(found, expected)


def test_its_input_may_be_passed_by_name() -> None:
    model = Conv1D(3, 2)
    optimizer = KFAC(model, lr=0.1)
    model(x=torch.ones(4, 2)).square().mean().backward()
    optimizer.step()
    assert optimizer.factor("")[0].tolist() == torch.ones(1, 3, 3).tolist()


@pytest.mark.parametrize("method", ["matrix", "unmatrix"])
def test_mutants_are_caught(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is not transposed where it is square."""
    own = getattr(TransposedLinearLayer, method)
    base = getattr(TransposedLinearLayer.__base__, method)

    def without_transpose(self: TransposedLinearLayer, *tensors: Tensor | None) -> Any:
        is_square = self.weight.shape[0] == self.weight.shape[1]
        return (base if is_square else own)(self, *tensors)

    monkeypatch.setattr(TransposedLinearLayer, method, without_transpose)
    with pytest.raises(AssertionError):
        test_it_steps_like_the_linear_layer_with_the_transposed_weight((6,), "expand", "eigen")
