"""Our rules of forward mode against torch's own, one direction after another."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from mutants import replace
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

import kfac.forward_mode
from kfac.forward_mode import SharedPrimals, dual, load_forward_mode, parts

Values = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def forward_mode() -> None:
    load_forward_mode()


class Frozen(nn.Module):
    """A layer whose input does not depend on any parameter, beside one whose input does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = self.layer(x)
        return once + self.layer(once) if once.shape == x.shape else once


def conv(dims: int, channels: int = 4, **settings: object) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(channels, 4, 3, **settings)


class Functional(nn.Module):
    """Functions with keywords, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.weight, padding="same")
        x = F.batch_norm(x, running_mean=None, running_var=None, weight=self.scale, training=True)
        x = F.conv2d(x.relu_(), self.weight, stride=2)
        return F.linear(x, weight=self.weight[:2, :3, 0, 0].repeat(1, 1), bias=self.scale[:2])


# name: module, input
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: Frozen(conv(1, padding=1)), (5, 4, 6)),
    "conv2d": (lambda: Frozen(conv(2, padding="same")), (5, 4, 6, 5)),
    "conv3d": (lambda: Frozen(conv(3, padding=1, bias=False)), (2, 4, 4, 3, 5)),
    "stride and dilation": (
        lambda: nn.Sequential(conv(2, stride=2, padding=2), conv(2, padding=2, dilation=2)),
        (3, 4, 9, 8),
    ),
    "groups": (lambda: nn.Sequential(conv(2, groups=2), conv(2, groups=4)), (3, 4, 7, 7)),
    "circular padding": (
        lambda: Frozen(conv(2, padding=1, padding_mode="circular")), (3, 4, 5, 5),
    ),
    "no batch axis": (lambda: nn.Sequential(conv(2), conv(2)), (4, 7, 7)),
    "channels last": (
        lambda: nn.Sequential(conv(2), conv(2)).to(memory_format=torch.channels_last), (3, 4, 7, 7),
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 2)), (3, 4, 5, 5)),
    "linear": (lambda: Frozen(nn.Linear(4, 4)), (5, 4)),
    "linear, positions": (lambda: Frozen(nn.Linear(4, 4, bias=False)), (5, 3, 4)),
    "linear, no batch axis": (lambda: Frozen(nn.Linear(4, 4)), (4,)),
    "BatchNorm1d": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (7, 4)),
    "BatchNorm1d, positions": (lambda: nn.Sequential(conv(1), nn.BatchNorm1d(4)), (5, 4, 6)),
    "BatchNorm2d": (lambda: nn.Sequential(conv(2), nn.BatchNorm2d(4)), (5, 4, 6, 6)),
    "BatchNorm3d": (lambda: nn.Sequential(conv(3), nn.BatchNorm3d(4)), (3, 4, 4, 4, 5)),
    "BatchNorm first": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv(2)), (5, 4, 6, 6)),
    "BatchNorm, no parameters": (
        lambda: nn.Sequential(conv(2), nn.BatchNorm2d(4, affine=False, momentum=None)),
        (5, 4, 6, 6),
    ),
    "BatchNorm, no running statistics": (
        lambda: nn.Sequential(conv(2), nn.BatchNorm2d(4, track_running_stats=False)), (5, 4, 6, 6),
    ),
    "BatchNorm, evaluating": (
        lambda: nn.Sequential(conv(2), nn.BatchNorm2d(4).eval()), (5, 4, 6, 6),
    ),
    "in place": (
        lambda: nn.Sequential(
            conv(2), nn.LeakyReLU(0.5, inplace=True),
            conv(2), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(36, 3), nn.Hardtanh(inplace=True),
        ),
        (5, 4, 7, 7),
    ),
    "functions": (Functional, (5, 4, 6, 6)),
}  # fmt: skip


def prepared(case: str) -> tuple[Callable[[Values], Tensor], Values]:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def forward(parameters: Values) -> Tensor:
        cloned = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(model, {**cloned, **parameters}, x.clone())

    return forward, {name: p.detach() for name, p in model.named_parameters()}


def directions(parameters: Values) -> Iterator[Values]:
    """Everything moves; everything but one parameter; one parameter alone."""
    yield {name: torch.randn_like(p) for name, p in parameters.items()}
    for left_out in parameters if len(parameters) > 1 else ():
        yield {name: torch.randn_like(p) for name, p in parameters.items() if name != left_out}
    for alone in parameters:
        yield {alone: torch.randn_like(parameters[alone])}


def pushed(
    forward: Callable[[Values], Tensor], at: Values, direction: Values, rules: SharedPrimals
) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad(), forward_ad.dual_level(), rules:
        return parts(forward(at | {name: dual(at[name], d) for name, d in direction.items()}))


def check(case: str, keep: bool = True) -> None:
    forward, at = prepared(case)
    rules = SharedPrimals(keep=keep)
    for direction in directions(at):
        whole = {name: direction.get(name, torch.zeros_like(p)) for name, p in at.items()}
        expected, expected_tangent = jvp(forward, (at,), (whole,))
        output, tangent = pushed(forward, at, direction, rules)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tangent, expected_tangent, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "forget"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_torch(case: str, keep: bool) -> None:
    check(case, keep)


def test_primal_values_are_computed_once_unless_they_were_overwritten() -> None:
    forward, at = prepared("in place")
    calls: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    names = "convolution.default", "native_batch_norm.default"
    rules, counts = SharedPrimals(keep=True), []
    for direction in (next(directions(at)), next(directions(at))):
        calls.clear()
        with Count():
            pushed(forward, at, direction, rules)
        counts.append([calls.count(name) for name in names])
    # Two convolutions and one normalisation. The first convolution and the normalisation are
    # followed by an activation in place.
    assert counts == [[4, 1], [3, 1]]


def test_running_statistics_move_as_in_a_forward_pass() -> None:
    torch.manual_seed(0)
    norm, twin = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad(), forward_ad.dual_level(), SharedPrimals(keep=True):
        norm(dual(x, torch.randn_like(x)))
    twin(x)
    assert torch.equal(norm.running_mean, twin.running_mean)
    assert torch.equal(norm.running_var, twin.running_var)


def in_order(rules: SharedPrimals, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """As the rules do, but for the look at what has been overwritten."""
    kept = rules.__dict__.setdefault("results", [])
    index, rules._next = rules._next, rules._next + 1
    if index == len(kept):
        kept.append(compute())
    return kept[index]


MUTANTS = {
    "overwritten values are kept": (
        SharedPrimals, "_primal",
        lambda original, self, compute: in_order(self, compute),
        lambda: check("in place"),
    ),
    "all operations share one value": (
        SharedPrimals, "_primal",
        lambda original, self, compute: self.__dict__.setdefault("one", {}).setdefault(
            compute.__code__, compute()
        ),
        lambda: check("conv2d"),
    ),
    "terms of the product rule swapped": (
        torch, "cat", lambda original, pieces, axis=0: original(
            pieces if axis == 1 else pieces[::-1], axis
        ),
        lambda: check("conv2d"),
    ),
    "the bias does not move": (
        kfac.forward_mode, "_optional_parts",
        lambda original, value: (original(value)[0], None), lambda: check("linear"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, mutant, test = MUTANTS[name]
    replace(owner, attribute, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        test()
