"""Attention is four linear layers, whichever way its weights are packed and used."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from mutants import replace
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac.linear_calls
from kfac import KFAC
from kfac.linear_calls import LinearCalls, Target
from kfac.taps import Taps

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
WIDTH, HEADS, CLASSES, DAMPING = 4, 2, 3, 0.3
PLAIN: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": DAMPING, "inverse": "eigen",
    "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip


class Attending(nn.Module):
    """Sequences [N, T, width] to logits, by torch's attention."""

    def __init__(self, memory: int | None = None, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.memory = memory
        self.att = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        for p in self.att.parameters():
            nn.init.normal_(p, std=0.5)
        self.widths = self.att.kdim, self.att.vdim
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values from one tensor, sharing what the settings say."""
        if self.memory is None:
            return x, x, x
        other = torch.sin(torch.cat([x, x[:, :1]], dim=1) * 2)
        keys = other[..., : self.widths[0]]
        return x, keys, keys if self.memory == 1 else other[..., : self.widths[1]].cos()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x)
        if not self.att.batch_first:
            turned = {id(t): t.transpose(0, 1) for t in (q, k, v)}
            q, k, v = (turned[id(t)] for t in (q, k, v))
        return self.head(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, _ = self.att(q, k, v, need_weights=self.memory == 1)
        return (y if self.att.batch_first else y.transpose(0, 1)).mean(1)


class WrittenOut(Attending):
    """The same with four linear modules and a softmax."""

    def __init__(self, source: Attending) -> None:
        super().__init__()
        source = copy.deepcopy(source)
        self.memory, self.widths, self.head = source.memory, source.widths, source.head
        del self.att
        att = source.att
        packed, separate = att.in_proj_weight, (att.q_proj_weight, att.k_proj_weight)
        weights = packed.chunk(3) if packed is not None else (*separate, att.v_proj_weight)
        biases = [None] * 3 if att.in_proj_bias is None else att.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            setattr(self, f"{name}_proj", self.linear(weight, bias))
        self.out_proj = self.linear(att.out_proj.weight, att.out_proj.bias)
        self.extra, self.zero = (att.bias_k, att.bias_v), att.add_zero_attn

    def linear(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        layer = nn.Linear(*reversed(weight.shape), bias=bias is not None).double()
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        return layer

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x)
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        if self.extra[0] is not None:
            k, v = (
                torch.cat([t, e.detach().expand(len(t), 1, -1)], dim=1)
                for t, e in zip((k, v), self.extra, strict=True)
            )
        if self.zero:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        q, k, v = (self.heads(t) for t in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.head(self.out_proj((weights @ v).transpose(1, 2).flatten(2)).mean(1))


SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed, batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "keys are values": {"memory": 1, "batch_first": True},
    "keys and values differ": {"memory": 2},
    "separate projections": {"memory": 1, "kdim": 3, "vdim": 3},
    "separate, of different widths": {"memory": 2, "kdim": 3, "vdim": 2, "batch_first": True},
    "separate without bias": {"memory": 2, "kdim": 3, "vdim": 2, "bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "memory": 1},
}


def train(model: nn.Module, x: Tensor, target: Tensor, **settings: Any) -> KFAC:
    criterion = nn.CrossEntropyLoss()
    if settings.get("fisher") not in ("empirical", "forward-only"):
        settings["criterion"] = criterion
    optimizer = KFAC(model, **PLAIN | settings)
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(x), target).backward()
        optimizer.step()
    return optimizer


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.arange(5) % CLASSES


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """By the names of torch's separate projections."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("att.").replace("proj_weight", "proj.weight")
        if name in ("in_proj.weight", "in_proj_bias"):
            kind = "bias" if name == "in_proj_bias" else "weight"
            parts = zip("qkv", parameter.detach().chunk(3), strict=True)
            found |= {f"{part}_proj.{kind}": value for part, value in parts}
        elif not name.startswith("bias_"):
            found[name] = parameter.detach()
    return found


@pytest.mark.promise("`nn.MultiheadAttention`")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "choice",
    [
        {"fisher": "type-2"},
        {"fisher": "mc"},
        {"fisher": "empirical"},
        {"fisher": "forward-only"},
        {"fisher": "type-2", "weight_sharing": "reduce"},
        {"fisher": "empirical", "weight_sharing": "reduce"},
    ],
    ids=lambda choice: ", ".join(choice.values()),
)
def test_it_steps_like_four_linear_modules(settings: str, choice: dict[str, Any]) -> None:
    model = Attending(**SETTINGS[settings])
    for extra in (model.att.bias_k, model.att.bias_v):
        if extra is not None:
            extra.requires_grad_(False)
    written_out = WrittenOut(model)
    x, target = batch()
    close(model(x), written_out(x))
    optimizer = train(model, x, target, **choice)
    reference = train(written_out, x, target, **choice)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        for found, expected in zip(
            optimizer.factor(f"att.{name}"), reference.factor(name), strict=True
        ):
            close(found, expected)
    expected = {name: p.detach() for name, p in written_out.named_parameters()}
    assert parameters_of(model).keys() == expected.keys()
    for name, value in parameters_of(model).items():
        close(value, expected[name])


@pytest.mark.parametrize("settings", ["packed", "separate, of different widths"])
def test_one_token_is_exact(settings: str) -> None:
    """With one key the weights are constant: values and output are linear layers in a row."""
    model = Attending(**SETTINGS[settings])
    model.inputs = lambda x: (x, *(x[..., :width] for width in model.widths))
    written_out = WrittenOut(model)
    written_out.inputs = model.inputs
    before = parameters_of(copy.deepcopy(model))
    x, target = batch()
    x, target = x[:1, :1], target[:1]
    criterion = nn.CrossEntropyLoss()
    data = x, target, criterion
    gradients = oracles.parameter_blocks(written_out, oracles.gradients(written_out, *data))
    fishers = {name: oracles.ggn_blocks(written_out, name, *data) for name in gradients}
    optimizer = KFAC(model, criterion=criterion, fisher="type-2", **PLAIN)
    criterion(model(x), target).backward()
    optimizer.step()
    moved = {name: value - before[name] for name, value in parameters_of(model).items()}
    for name, gradient in gradients.items():
        expected = -oracles.solve(fishers[name], DAMPING, gradient)
        layer = written_out.get_submodule(name)
        found = oracles.to_blocks(layer, moved[f"{name}.weight"], moved[f"{name}.bias"])
        close(found, expected)


@pytest.mark.promise("`nn.MultiheadAttention`")
def test_outputs_and_gradients_stay_bit_identical() -> None:
    for settings in SETTINGS.values():
        plain = Attending(**settings)
        watched = copy.deepcopy(plain)
        optimizer = KFAC(watched, lr=0.1)  # noqa: F841 (its hooks live with it)
        x, target = batch()
        outputs = [m(x) for m in (plain, watched)]
        assert torch.equal(*outputs)
        for output in outputs:
            F.cross_entropy(output, target).backward()
        for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    class Recomputing(Attending):
        def attend(self, *inputs: Tensor) -> Tensor:
            return checkpoint(super().attend, *inputs, use_reentrant=reentrant)

    fisher = "empirical" if reentrant else "mc"
    x, target = batch()
    plain, recomputing = Attending(), Recomputing()
    for model in (plain, recomputing):
        train(model, x.clone().requires_grad_(), target, fisher=fisher)
    for p, q in zip(plain.parameters(), recomputing.parameters(), strict=True):
        close(p, q)


@pytest.mark.promise("`nn.MultiheadAttention`")
def test_masks_dropout_and_single_sequences_are_seen() -> None:
    att = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    optimizer = KFAC(att, lr=0.1, loss_terms=1)
    x = torch.randn(3, WIDTH)
    mask = torch.tensor([False, False, True])
    att(x, x, x, key_padding_mask=mask)[0].square().mean().backward()
    optimizer.step()
    a, _ = optimizer.factor("k_proj")
    close(a[0, :-1, :-1], x.T @ x / 3, rtol=1e-5, atol=1e-6)


def test_encoder_layers_are_covered() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True), 2
    )
    optimizer = KFAC(encoder, lr=0.1)
    assert optimizer.summary().fraction("kfac") == 1.0
    encoder(torch.randn(2, 3, WIDTH)).square().mean().backward()
    optimizer.step()
    for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert optimizer.factor(f"layers.1.self_attn.{layer}")[1].abs().sum() > 0


def test_the_summary_shows_all_layers_of_a_packed_weight() -> None:
    rows = {r.parameter: r for r in KFAC(nn.MultiheadAttention(4, 2), lr=0.1).summary()}
    assert rows["in_proj_weight"].factors == "3 of A 1×5×5, G 1×4×4"
    assert rows["out_proj.weight"].factors == "A 1×5×5, G 1×4×4"


def test_a_frozen_packed_weight_is_left_alone() -> None:
    model = Attending()
    model.att.in_proj_weight.requires_grad_(False)
    rows = {r.parameter: r for r in KFAC(model, lr=0.1).summary()}
    assert rows["att.in_proj_weight"].reason == "frozen"
    assert rows["att.in_proj_bias"].treatment == "fallback"
    assert rows["att.in_proj_bias"].reason


def test_a_torch_that_computes_attention_otherwise_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(F, "_in_projection", lambda *a: None)
    model = Attending()
    optimizer = KFAC(model, lr=0.1)  # noqa: F841 (its hooks live with it)
    with pytest.raises(RuntimeError, match=r"skip="):
        model(batch()[0])


# --- weights of linear modules used without calling them -------------------------------------


class Functional(nn.Module):
    """A linear module that is not called, and one that is both called and not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def use(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, bias=layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(self.use(self.first, x).tanh()).tanh()
        return self.head(self.use(self.both, x).tanh().mean(1))


class Called(Functional):
    def use(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)


@pytest.mark.promise("`F.linear` with the weight of a module")
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_functional_linear_is_as_good_as_a_call(fisher: str, sharing: str) -> None:
    x, target = batch()
    functional, called = Functional(), Called()
    for model in (functional, called):
        train(model, x, target, fisher=fisher, weight_sharing=sharing)
    for p, q in zip(functional.parameters(), called.parameters(), strict=True):
        close(p, q)


def test_once_all_is_known_to_be_called_nothing_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = []
    monkeypatch.setattr(LinearCalls, "enter", lambda self: looked.append(1))
    x, target = batch()
    train(Called(), x, target, fisher="mc")
    assert len(looked) == 1


def test_an_exception_in_the_model_leaves_no_mode_behind() -> None:
    class Failing(Functional):
        def use(self, layer: nn.Linear, x: Tensor) -> Tensor:
            raise KeyError

    model = Failing()
    optimizer = KFAC(model, lr=0.1)  # noqa: F841 (its hooks live with it)
    with pytest.raises(KeyError):
        model(batch()[0])
    assert torch.overrides._len_torch_function_stack() == 0


def swapped(original: Callable, target: Target, g: Tensor) -> Tensor:
    """Keys get the gradients of queries."""
    columns = target.columns
    if columns is not None and columns.start == WIDTH:
        columns = slice(0, WIDTH)
    return original(Target(target.layer, columns, target.batch), g)


def test_a_functional_call_without_the_bias_is_noticed() -> None:
    class WithoutBias(Functional):
        def use(self, layer: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(x, layer.weight)

    model = WithoutBias()
    optimizer = KFAC(model, lr=0.1)  # noqa: F841 (its hooks live with it)
    with pytest.warns(UserWarning, match="'both' is used 2 times"):
        model(batch()[0])


def packed() -> None:
    choice = {"fisher": "empirical", "weight_sharing": "reduce"}
    test_it_steps_like_four_linear_modules("packed", choice)


MUTANTS: dict[str, tuple[Callable, Callable]] = {
    "columns of a packed projection mixed up": (replace(Target, "gradient", swapped), packed),
    "positions taken for examples": (
        replace(Target, "input", lambda original, target, x: x),
        packed,
    ),
    "the output projection is never seen": (
        replace(
            Taps,
            "_tap_linear",
            lambda original, self, targets, x, output: (
                output
                if targets[0].layer.name.endswith("out_proj")
                else original(self, targets, x, output)
            ),
        ),
        packed,
    ),
    "a functional call without the bias counts as one with it": (
        replace(kfac.linear_calls, "_has_bias_of", lambda original, layer, bias: True),
        test_a_functional_call_without_the_bias_is_noticed,
    ),
}


@pytest.mark.filterwarnings("ignore:The layer")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = MUTANTS[mutant]
    test()
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test()
