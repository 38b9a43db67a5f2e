"""The scale and shift of norm layers against x̂ written out from means and variances."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mutants import replace
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfac import KFAC
from kfac.layers import Layer, Piece, layer_type_for
from kfac.layers.norm import BatchNormLayer, LayerNormLayer, NormLayer

# BatchNorm stands where the examples of a batch may mix.
pytestmark = pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)

DAMPING = 0.3
PLAIN: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": DAMPING, "inverse": "eigen",
    "fisher": "type-2", "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip


class Case(NamedTuple):
    """A norm layer, the shape of its inputs, and the mode that it is called in."""

    kind: Callable[..., nn.Module]
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    settings: dict[str, Any] = {}  # noqa: RUF012
    training: bool = True
    has_bias: bool = True


NORMS = {
    "LayerNorm": Case(nn.LayerNorm, (4,), (5, 4)),
    "LayerNorm, 3 positions": Case(nn.LayerNorm, (4,), (5, 3, 4)),
    "LayerNorm, 2×3 positions": Case(nn.LayerNorm, (4,), (5, 2, 3, 4)),
    "LayerNorm, weight 2×2": Case(nn.LayerNorm, ((2, 2),), (5, 3, 2, 2)),
    "LayerNorm without bias": Case(nn.LayerNorm, (4,), (5, 3, 4), has_bias=False),
    "RMSNorm": Case(nn.RMSNorm, (4,), (5, 4)),
    "RMSNorm, 3 positions": Case(nn.RMSNorm, (4,), (5, 3, 4)),
    "RMSNorm, weight 2×2": Case(nn.RMSNorm, ((2, 2),), (5, 3, 2, 2)),
    "RMSNorm, eps of the dtype": Case(nn.RMSNorm, (4,), (5, 3, 4), {"eps": None}),
    "GroupNorm": Case(nn.GroupNorm, (2, 4), (5, 4)),
    "GroupNorm, 3 positions": Case(nn.GroupNorm, (2, 4), (5, 4, 3)),
    "GroupNorm, 2×3 positions": Case(nn.GroupNorm, (2, 4), (5, 4, 2, 3)),
    "GroupNorm, 1×1 positions": Case(nn.GroupNorm, (2, 4), (5, 4, 1, 1)),
    "GroupNorm, one group": Case(nn.GroupNorm, (1, 4), (5, 4, 3)),
    "GroupNorm without bias": Case(nn.GroupNorm, (2, 4), (5, 4, 3), has_bias=False),
    "BatchNorm1d": Case(nn.BatchNorm1d, (4,), (5, 4)),
    "BatchNorm1d, 3 positions": Case(nn.BatchNorm1d, (4,), (5, 4, 3)),
    "BatchNorm1d, evaluating": Case(nn.BatchNorm1d, (4,), (5, 4), training=False),
    "BatchNorm2d": Case(nn.BatchNorm2d, (4,), (5, 4, 2, 3)),
    "BatchNorm2d without bias": Case(nn.BatchNorm2d, (4,), (5, 4, 2, 3), has_bias=False),
    "BatchNorm2d, evaluating": Case(nn.BatchNorm2d, (4,), (5, 4, 2, 3), training=False),
    "BatchNorm2d, untracked, evaluating": Case(
        nn.BatchNorm2d, (4,), (5, 4, 2, 3), {"track_running_stats": False}, training=False
    ),
    "BatchNorm3d": Case(nn.BatchNorm3d, (4,), (5, 4, 1, 2, 3)),
} | {
    f"InstanceNorm{dims}d{name}": Case(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1],
        (4,),
        (5, 4, *(3, 2, 2)[:dims]),
        {"affine": True, "track_running_stats": tracked},
        training=training,
        has_bias=has_bias,
    )
    for dims, name, tracked, training, has_bias in [
        (1, "", False, True, True),
        (1, ", tracked", True, True, True),
        (1, ", tracked, evaluating", True, False, True),
        (2, "", False, True, True),
        (2, ", evaluating", False, False, True),
        (2, ", tracked, evaluating", True, False, True),
        (2, " without bias", False, True, False),
        (3, "", False, True, True),
    ]
}  # fmt: skip
ONE_POSITION = [name for name, case in NORMS.items() if len(case.shape) == 2]
ONE_POSITION += ["GroupNorm, 1×1 positions"]
TRACKED = ["BatchNorm1d, 3 positions", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d, tracked"]


def make(case: Case) -> Any:
    """The norm layer, with random parameters and running statistics, and an eps that matters."""
    norm = case.kind(*case.arguments, **{"eps": 0.1} | case.settings)
    if not case.has_bias:
        norm.register_parameter("bias", None)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


def rows(norm: Any, tensor: Tensor) -> Tensor:
    """An input or output of the layer as `[N, T, channels]`."""
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return tensor.reshape(len(tensor), -1, norm.weight.numel())
    return tensor.reshape(*tensor.shape[:2], -1).mT


class Net(nn.Module):
    """The norm layer, then a mean over positions or tanh, then a linear layer."""

    def __init__(self, case: Case, *, pooled: bool) -> None:
        super().__init__()
        self.norm, self.pooled = make(case), pooled
        example = rows(self.norm, torch.zeros(case.shape))[0]
        self.head = nn.Linear(example.shape[-1] if pooled else example.numel(), 2)

    def rest(self, hidden: Tensor) -> Tensor:
        hidden = rows(self.norm, hidden)
        return self.head(hidden.mean(1) if self.pooled else hidden.tanh().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(x))


def build(case: Case, *, pooled: bool = False) -> tuple[Net, Tensor, Tensor]:
    """A net, its inputs and its targets."""
    torch.manual_seed(0)
    net = Net(case, pooled=pooled).double().train(case.training)
    inputs = 2 * torch.randn(case.shape, dtype=torch.float64) + 1
    return net, inputs, torch.randn(len(inputs), 2, dtype=torch.float64)


def step(net: nn.Module, inputs: Tensor, target: Tensor, **changes: Any) -> KFAC:
    criterion = nn.MSELoss()
    optimizer = KFAC(net, criterion=criterion, **PLAIN | changes)
    criterion(net(inputs), target).backward()
    optimizer.step()
    return optimizer


def moved(after: Any, before: Any) -> Tensor:
    """How far γ and β have moved, `[channels, 1, 1 or 2]`."""
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    return columns([new.detach() - old.detach() for new, old in pairs])


def columns(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.flatten() for tensor in tensors], dim=1)[:, None]


# References


def normalized(norm: Any, x: Tensor, *, training: bool) -> Tensor:
    """x̂ `[N, T, channels]` by the definition of each norm layer."""
    x = rows(norm, x)
    is_batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    if isinstance(norm, nn.RMSNorm):
        return x / (x.square().mean(2, keepdim=True) + eps).sqrt()
    if not training and getattr(norm, "running_mean", None) is not None:
        return (x - norm.running_mean) / (norm.running_var.to(x.dtype) + eps).sqrt()
    if isinstance(norm, nn.GroupNorm):
        groups = x.unflatten(2, (norm.num_groups, -1)).split(1, dim=2)
        return torch.cat([standardized(group, (1, 2, 3), eps) for group in groups], 2).flatten(2)
    if isinstance(norm, nn.LayerNorm):
        return standardized(x, (2,), eps)
    return standardized(x, (0, 1) if is_batch else (1,), eps)


def standardized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()


def input_rows(norm: Any, x: Tensor, *, training: bool) -> Tensor:
    """The inputs (x̂, 1) `[N, T, channels, 1 or 2]`."""
    x_hat = normalized(norm, x, training=training)
    entries = [x_hat] if getattr(norm, "bias", None) is None else [x_hat, torch.ones_like(x_hat)]
    return torch.stack(entries, dim=-1)


def factors(
    net: Net, inputs: Tensor, target: Tensor, sharing: str, *, training: bool
) -> tuple[Tensor, Tensor]:
    """A and G of the norm layer by explicit sums."""
    hidden = net.norm(inputs).detach()
    jacobian = jacrev(lambda h: net.rest(h).flatten())(hidden)
    seen = oracles.Layer(
        inputs=input_rows(net.norm, inputs, training=training),
        jacobian=torch.stack([rows(net.norm, element) for element in jacobian]).unsqueeze(-1),
        gradient=hidden,  # of the empirical Fisher only
        hessian=oracles.loss_hessian(net.rest(hidden), target, nn.MSELoss()),
    )
    return oracles.input_factor(seen, sharing), oracles.exact_output_factor(seen, sharing)


def natural_step(net: Net, inputs: Tensor, target: Tensor, criterion: nn.Module) -> Tensor:
    """−(F + λI)⁻¹ g with the generalised Gauss-Newton blocks of the channels' (γ, β)."""
    values = {key: p.detach() for key, p in net.norm.named_parameters(prefix="norm")}
    if net.training and hasattr(net.norm, "running_mean"):  # torch.func cannot update them
        net.norm.running_mean = net.norm.running_var = net.norm.num_batches_tracked = None
    output = functional_call(net, values, (inputs,))
    jacobian = jacrev(lambda v: functional_call(net, v, (inputs,)).flatten())(values)
    blocks = torch.stack([jacobian[key].flatten(1) for key in values], dim=-1)
    hessian = oracles.loss_hessian(output, target, criterion)
    fisher = torch.einsum("mcp,mk,kcq->cpq", blocks, hessian, blocks)
    slope = torch.autograd.functional.jacobian(lambda o: criterion(o, target), output.detach())
    gradient = torch.einsum("m,mcp->cp", slope.flatten(), blocks)[:, None]
    return -oracles.solve(fisher, DAMPING, gradient)


@pytest.mark.parametrize("name", NORMS)
def test_reference_scaled_and_shifted_is_the_module(name: str) -> None:
    case = NORMS[name]
    net, inputs, _ = build(case)
    parameters = columns(list(net.norm.parameters()))[:, 0]
    expected = (input_rows(net.norm, inputs, training=case.training) * parameters).sum(-1)
    close(rows(net.norm, net.norm(inputs)), expected)


# The optimizer


def check_step(case: Case, sharing: str) -> None:
    """Factors and step are those of explicit sums and dense solves."""
    net, inputs, target = build(case)
    before = copy.deepcopy(net)
    found = step(net, inputs, target, weight_sharing=sharing).factor("norm")
    expected = factors(before, inputs, target, sharing, training=case.training)
    close(found, expected)
    gradient = columns([p.grad for p in net.norm.parameters()])
    close(moved(net.norm, before.norm), -oracles.solve_exact_damping(*expected, DAMPING, gradient))


@pytest.mark.promise("normalisation layers")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NORMS)
def test_factors_and_step_are_those_of_explicit_sums(name: str, sharing: str) -> None:
    check_step(NORMS[name], sharing)


SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    leading=SIZES,
    trailing=SIZES,
    has_bias=st.booleans(),
    sharing=st.sampled_from(["expand", "reduce"]),
)
def test_layer_norms_of_any_shape(
    leading: list[int], trailing: list[int], has_bias: bool, sharing: str
) -> None:
    shape = (*leading, *trailing)
    check_step(Case(nn.LayerNorm, (tuple(trailing),), shape, has_bias=has_bias), sharing)


@settings(max_examples=25, deadline=None)
@given(
    examples=st.integers(1, 3), groups=st.integers(1, 3), size=st.integers(1, 3), spatial=SIZES,
    has_bias=st.booleans(), sharing=st.sampled_from(["expand", "reduce"]),
)  # fmt: skip
def test_group_norms_of_any_shape(
    examples: int, groups: int, size: int, spatial: list[int], has_bias: bool, sharing: str
) -> None:
    shape, channels = (examples, groups * size, *spatial), groups * size
    assume(prod(shape) > groups)  # torch refuses a single value
    check_step(Case(nn.GroupNorm, (groups, channels), shape, has_bias=has_bias), sharing)


@pytest.mark.parametrize("name", NORMS)
def test_step_is_the_dense_natural_gradient_before_a_mean_over_positions(name: str) -> None:
    net, inputs, target = build(NORMS[name], pooled=True)
    before = copy.deepcopy(net)
    step(net, inputs, target, weight_sharing="reduce")
    expected = natural_step(before, inputs, target, nn.MSELoss())
    close(moved(net.norm, before.norm), expected)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", [*ONE_POSITION, "InstanceNorm2d, tracked, evaluating"])
def test_step_is_the_dense_natural_gradient_for_one_example(name: str, sharing: str) -> None:
    """One position and any network behind; a batch's statistics would be those of nothing."""
    case = NORMS[name]
    shape = (1, *case.shape[1:2], *[1] * (len(case.shape) - 2))
    net, inputs, _ = build(case._replace(shape=shape, training=False))
    net.head = nn.Sequential(net.head, nn.Tanh(), nn.Linear(2, 3)).double()
    target, criterion = torch.tensor([1]), nn.CrossEntropyLoss()
    before = copy.deepcopy(net)
    optimizer = KFAC(net, criterion=criterion, **PLAIN | {"weight_sharing": sharing})
    criterion(net(inputs), target).backward()
    optimizer.step()
    close(moved(net.norm, before.norm), natural_step(before, inputs, target, criterion))


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("name", NORMS)
def test_a_weight_of_zeros_tells_nothing_about_the_inputs(name: str, inverse: str) -> None:
    case = NORMS[name]
    net, inputs, target = build(case)
    nn.init.zeros_(net.norm.weight)
    before = copy.deepcopy(net)
    found = step(net, inputs, target, inverse=inverse).factor("norm")
    close(found, factors(before, inputs, target, "expand", training=case.training))
    assert moved(net.norm, before.norm).isfinite().all()


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm2d"])
def test_a_constant_channel_does_no_harm(name: str, inverse: str) -> None:
    net, inputs, target = build(NORMS[name])
    inputs[:, 1] = 7.0
    before = copy.deepcopy(net)
    found = step(net, inputs, target, inverse=inverse).factor("norm")
    close(found, factors(before, inputs, target, "expand", training=True))
    close(found[0][1], torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double())
    assert moved(net.norm, before.norm).isfinite().all()


@pytest.mark.parametrize("name", NORMS)
def test_large_factors_keep_their_diagonal(name: str) -> None:
    full, kept = (step(*build(NORMS[name]), max_factor_dim=dim).factor("norm") for dim in (1000, 1))
    close(kept[0].flatten(), full[0].diagonal(dim1=1, dim2=2).flatten())
    close(kept[1], full[1])


# Calls


@pytest.mark.promise("normalisation layers")
@pytest.mark.parametrize("name", TRACKED)
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_forward_pass_counts(name: str, training: bool) -> None:
    net, inputs, target = build(NORMS[name])
    net.train(training)
    before, criterion = copy.deepcopy(net), nn.MSELoss()
    optimizer = KFAC(net, criterion=criterion, **PLAIN)
    loss = criterion(net(inputs), target)
    net.eval()
    net(3 * inputs)  # a call that no backward pass follows
    net.train(not training)
    loss.backward()
    optimizer.step()
    close(optimizer.factor("norm"), factors(before, inputs, target, "expand", training=training))


@pytest.mark.parametrize("name", NORMS)
def test_outputs_and_running_statistics_are_bit_identical(name: str) -> None:
    def run(attach: bool) -> list[Tensor]:
        net, inputs, target = build(NORMS[name])
        net, criterion, seen = net.float(), nn.MSELoss(), []
        chosen = PLAIN | {"criterion": criterion, "fisher": "mc", "lr": 0.0}
        optimizer = KFAC(net, **chosen) if attach else None
        for scale in (1.0, 2.0, 3.0):
            output = net(scale * inputs.float())
            criterion(output, target.float()).backward()
            if optimizer is not None:
                optimizer.step()
            seen += [output.detach(), *(p.grad.clone() for p in net.parameters())]
            seen += [buffer.clone() for buffer in net.buffers()]
        return seen

    assert all(map(torch.equal, run(True), run(False)))


@pytest.mark.parametrize(
    ("kind", "arguments", "shape"),
    [
        (nn.LayerNorm, ((3, 2),), (3, 2)),
        (nn.RMSNorm, (4,), (4,)),
        (partial(nn.InstanceNorm1d, affine=True), (3,), (3, 4)),
        (partial(nn.InstanceNorm2d, affine=True), (3,), (3, 4, 2)),
        (partial(nn.InstanceNorm3d, affine=True, track_running_stats=True), (3,), (3, 4, 2, 2)),
    ],
)
def test_an_unbatched_input_is_a_batch_of_one(
    kind: Callable[..., Any], arguments: tuple[Any, ...], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(shape, dtype=torch.float64)
    results = []
    for x in inputs, inputs[None]:
        norm = kind(*arguments).double()
        chosen = {"fisher": "empirical", "loss_terms": 1}
        optimizer = KFAC(norm, **PLAIN | chosen)
        (norm(x) - x).square().sum().backward()
        optimizer.step()
        results.append([*optimizer.factor(""), *norm.parameters()])
        assert (norm.weight != 1).any()
    close(*results)


@pytest.mark.parametrize(("kind", "keyword"), [(nn.LayerNorm, "input"), (nn.RMSNorm, "x")])
def test_the_input_may_be_given_by_name(kind: type[nn.Module], keyword: str) -> None:
    norm, x = kind(4), torch.randn(3, 4)
    optimizer = KFAC(norm, lr=0.1, loss_terms=3)
    norm(**{keyword: x}).square().mean().backward()
    optimizer.step()
    assert optimizer.factor("")[0].isfinite().all()


@pytest.mark.parametrize("examples", [1, 2, 6])
@pytest.mark.parametrize("name", NORMS)
def test_leading_axes_behind_the_examples_are_positions(name: str, examples: int) -> None:
    case = NORMS[name]._replace(shape=(6, *NORMS[name].shape[1:]))
    net, x, _ = build(case)
    layer = layer_of(net.norm).as_called()
    expected = input_rows(net.norm, x, training=case.training)
    expected = expected.reshape(examples, -1, *expected.shape[2:])
    gradients = rows(net.norm, x).reshape(examples, -1, net.norm.weight.numel(), 1)
    close(layer.input_rows(x, examples), expected)
    close(layer.input_mean(x, examples), expected.mean(1))
    close(layer.gradient_rows(x, examples), gradients)
    close(layer.gradient_sum(x, examples), gradients.sum(1))
    assert layer.row_count(x) == expected.shape[:2].numel()
    assert layer.leading_size(x) == 6


def layer_of(norm: Any) -> Layer:
    kind, bias = layer_type_for(norm), getattr(norm, "bias", None)
    assert kind is not None
    return kind(
        "norm", norm, weight_sharing="expand", weight=Piece(norm.weight),
        bias=None if bias is None else Piece(bias), max_factor_dim=10, identity_g=False,
    )  # fmt: skip


# Dtypes


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "of_inputs", "autocast"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
    ],
)
def test_low_precision_has_factors_in_float32(
    name: str, dtype: torch.dtype, of_inputs: torch.dtype, autocast: bool
) -> None:
    case = NORMS[name]
    net, inputs, target = build(case)
    inputs = inputs.to(of_inputs)
    net = net.to(dtype)
    expected = input_rows(net.norm, inputs.float(), training=case.training)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    criterion = nn.MSELoss()
    optimizer = KFAC(net, criterion=criterion, **PLAIN)
    with context:
        loss = criterion(net(inputs), target.to(dtype))
    loss.backward()
    optimizer.step()
    a, g = optimizer.factor("norm")
    assert a.dtype == g.dtype == torch.float32
    mean = torch.einsum("ntci,ntcj->cij", expected, expected) / expected.shape[:2].numel()
    torch.testing.assert_close(a, mean.float(), rtol=1e-4, atol=1e-5)
    assert all(p.isfinite().all() for p in net.parameters())


# What is taken

AFFINE = ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm1d", "InstanceNorm2d"]


@pytest.mark.parametrize("name", AFFINE)
def test_subclasses_with_a_forward_of_their_own_go_to_the_fallback(name: str) -> None:
    norm = make(NORMS[name])
    norm.__class__ = type("Subclass", (type(norm),), {"forward": lambda self, x: x})
    rows = KFAC(nn.Sequential(norm, make(NORMS[name])), lr=0.1).summary()
    treatments = {row.parameter.split(".")[0]: row.treatment for row in rows}
    assert treatments == {"0": "fallback", "1": "kfac"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4, elementwise_affine=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.BatchNorm1d(4, affine=False),
        nn.InstanceNorm1d(4),
    ],
)
def test_without_parameters_there_is_nothing_to_take(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Flatten(), nn.Linear(16, 2))
    optimizer = KFAC(model, lr=0.1)
    model(torch.randn(3, 2, 5)).square().mean().backward()
    optimizer.step()
    assert [row.parameter for row in optimizer.summary()] == [
        "0.weight", "0.bias", "3.weight", "3.bias",
    ]  # fmt: skip


@pytest.mark.promise("normalisation layers")
def test_synchronised_batch_norm_goes_to_the_fallback() -> None:
    rows = KFAC(nn.SyncBatchNorm(3), lr=0.1).summary()
    assert {(row.treatment, row.reason) for row in rows} == {
        ("fallback", "SyncBatchNorm is not supported")
    }


def test_a_frozen_bias_leaves_its_weight_under_kfac() -> None:
    net, inputs, target = build(NORMS["LayerNorm, 3 positions"])
    net.norm.bias.requires_grad_(False)
    before = copy.deepcopy(net)
    optimizer = step(net, inputs, target)
    assert optimizer.summary()[0].factors == "A 4×1×1, G 4×1×1"
    close(net.norm.bias, before.norm.bias)
    assert not torch.equal(net.norm.weight, before.norm.weight)


# Mutants


def divided(original: Callable, layer: NormLayer, x: Tensor) -> Tensor:
    """x̂ as the output says it."""
    weight = layer.module.weight.detach()
    return original(layer, x) * weight / weight


def without_eps(original: Callable, layer: NormLayer, x: Tensor) -> Tensor:
    eps, layer.module.eps = layer.module.eps, 1e-12
    result = original(layer, x)
    layer.module.eps = eps
    return result


def averaged(original: Callable, layer: NormLayer, values: Tensor) -> Tensor:
    moment = original(layer, values)
    return moment.mean(0, keepdim=True).expand_as(moment)


def by_running_statistics(original: Callable, layer: BatchNormLayer) -> BatchNormLayer:
    call = original(layer)
    call.by_running_statistics = True
    return call


STEP = test_factors_and_step_are_those_of_explicit_sums
ROWS = test_leading_axes_behind_the_examples_are_positions

# name: (the mutant, the test that catches it, that test's arguments)
MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable, tuple]] = {
    "x̂ recovered from the output": (
        replace(LayerNormLayer, "normalized", divided),
        test_a_weight_of_zeros_tells_nothing_about_the_inputs,
        ("LayerNorm, 3 positions", "eigen"),
    ),
    "running statistics in training": (
        replace(BatchNormLayer, "as_called", by_running_statistics), STEP, ("BatchNorm2d", "expand")
    ),
    "statistics of the batch in evaluation": (
        replace(BatchNormLayer, "as_called", lambda original, self: self),
        STEP,
        ("BatchNorm2d, evaluating", "expand"),
    ),
    "the mode of the backward pass": (
        replace(BatchNormLayer, "_sums", lambda original, self, x: original(self.as_called(), x)),
        test_the_mode_of_the_forward_pass_counts,
        ("BatchNorm2d", True),
    ),
    "A averaged over channels": (
        replace(NormLayer, "input_moment", averaged), STEP, ("GroupNorm, 3 positions", "expand")
    ),
    "G averaged over channels": (
        replace(NormLayer, "gradient_moment", averaged), STEP, ("GroupNorm, 3 positions", "expand")
    ),
    "eps ignored": (
        replace(LayerNormLayer, "normalized", without_eps), STEP, ("LayerNorm", "expand")
    ),
    "eps of running statistics ignored": (
        replace(BatchNormLayer, "normalized", without_eps),
        STEP,
        ("BatchNorm2d, evaluating", "expand"),
    ),
    "positions not counted": (
        replace(NormLayer, "row_count", lambda original, self, x: self.leading_size(x)),
        STEP,
        ("BatchNorm2d", "expand"),
    ),
    "summed over positions where the mean belongs": (
        replace(
            NormLayer, "input_mean",
            lambda original, self, x, examples: self.input_rows(x, examples).sum(1),
        ),
        STEP,
        ("InstanceNorm1d", "reduce"),
    ),
    "positions and channels exchanged": (
        replace(NormLayer, "channels_last", lambda original, self, tensor: tensor),
        ROWS,
        ("BatchNorm1d, 3 positions", 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test, arguments = MUTANTS[name]
    test(*arguments)  # passes as it is
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*arguments)
