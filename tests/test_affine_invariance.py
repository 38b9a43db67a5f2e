"""Without damping, a step does not depend on the coordinates of a layer's inputs and outputs.

A layer s = W a + b is put between other coordinates: it gets the inputs U a + u and has the outputs
Φ s + φ, and frozen modules around it change to these coordinates and back. The network is the same
function, and stays so. Momentum and the trust region are part of it, since ⟨Δ, g⟩ does not depend
on coordinates either.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from mutants import replace
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kfac import KFAC
from kfac.layers.linear import LinearLayer

# BatchNorm stands where the examples of a batch may mix.
pytestmark = pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")

randn = partial(torch.randn, dtype=torch.float64)
EXAMPLES, STEPS, CLASSES = 40, 3, 2
SETTINGS: dict[str, Any] = {
    "lr": 0.3, "momentum": 0.9, "kl_clip": 1e-3, "fisher": "type-2",
    "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip
# "cholesky" adds roots of λ to the factors.
DAMPING = {"eigen": 1e-12, "cholesky": 1e-20, "ekfac": 1e-12}


# Changes of coordinates


@dataclass
class Map:
    """x ↦ M x + m in every group of channels."""

    matrices: Tensor  # [groups, d, d]
    offset: Tensor  # [groups, d]

    def inverse(self) -> "Map":
        inverses = torch.linalg.inv(self.matrices)
        return Map(inverses, -torch.einsum("gij,gj->gi", inverses, self.offset))

    def frozen(self, dims: int | None) -> nn.Module:
        """A linear module, or a 1×1 convolution over some dimensions."""
        groups, size = len(self.matrices), self.offset.numel()
        module: nn.Module = nn.Linear(size, size)
        weight = torch.block_diag(*self.matrices)
        if dims is not None:
            module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](size, size, 1, groups=groups)
            weight = self.matrices.reshape(module.weight.shape)
        module.double().load_state_dict({"weight": weight, "bias": self.offset.flatten()})
        return module.requires_grad_(False)


def change(size: int, groups: int = 1, *, shift: bool = True) -> Map:
    """A random map that stretches every direction by about the same."""
    d = size // groups
    offset = randn(groups, d) if shift else torch.zeros(groups, d).double()
    return Map(2 * torch.eye(d).double() + 0.4 * randn(groups, d, d), offset)


def in_coordinates(
    weight: Tensor, bias: Tensor | None, inputs: Map, outputs: Map
) -> tuple[Tensor, Tensor]:
    """The layer that has those inputs and outputs, its weight as `[groups, d_out, d_in, taps]`."""
    back = torch.linalg.inv(inputs.matrices)
    weight = torch.einsum("gpo,goit,gij->gpjt", outputs.matrices, weight, back)
    bias = outputs.offset * 0 if bias is None else bias.reshape(outputs.offset.shape)
    bias = torch.einsum("gpo,go->gp", outputs.matrices, bias) + outputs.offset
    return weight, (bias - torch.einsum("gpjt,gj->gp", weight, inputs.offset)).flatten()


@torch.no_grad()
def move(layer: Any, inputs: Map, outputs: Map) -> None:
    """Put a linear layer or a convolution between coordinates, in place."""
    weight, transposed = layer.weight, isinstance(layer, _ConvNd) and layer.transposed
    first, second = weight.shape[0] // len(inputs.matrices), weight.shape[1]
    blocks = weight.reshape(-1, first, second, weight[0, 0].numel())
    blocks = blocks.transpose(1, 2) if transposed else blocks
    blocks, bias = in_coordinates(blocks, layer.bias, inputs, outputs)
    weight.copy_((blocks.transpose(1, 2) if transposed else blocks).reshape(weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(bias)


# Nets


class Net(nn.Module):
    """A layer between two changes of coordinates, tanh, a mean over positions, a linear layer."""

    def __init__(self, layer: nn.Module, channels: int, dims: int | None = None) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Identity(), layer, nn.Identity()
        self.head = nn.Linear(channels, CLASSES)
        self.dims = dims  # spatial ones, behind the channels; None where the channels are last
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.after(self.layer(self.before(x))).tanh()
        hidden = hidden if self.dims is None else hidden.movedim(1, -1)
        return self.head(hidden.reshape(len(x), -1, hidden.shape[-1]).mean(1))

    def between(self, before: nn.Module, outputs: Map) -> "Net":
        other = copy.deepcopy(self)
        other.before, other.after = before, outputs.inverse().frozen(self.dims)
        return other


class Attention(nn.Module):
    """Queries, keys and values in coordinates of their own; a mean over positions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(4, 2, batch_first=True, **settings)
        for parameter in self.att.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.widths = 4, settings.get("kdim", 4), settings.get("vdim", 4)
        self.before, self.after = nn.ModuleList([nn.Identity()] * 3), nn.Identity()
        self.head = nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        parts = enumerate(zip(self.before, self.widths, strict=True))
        inputs = [before(x.roll(i, 1)[..., :width]) for i, (before, width) in parts]
        return self.head(self.after(self.att(*inputs, need_weights=False)[0]).tanh().mean(1))


class Renumber(nn.Module):
    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.numbers[tokens]


# Pairs of nets that are one function, and inputs for them

Case = tuple[nn.Module, nn.Module, Callable[[], Tensor]]


def linear(*positions: int, bias: bool = True) -> Case:
    net = Net(nn.Linear(3, 4, bias=bias), 4)
    inputs, outputs = change(3, shift=bias), change(4, shift=bias)
    other = net.between(inputs.frozen(None), outputs)
    move(other.layer, inputs, outputs)
    return net, other, lambda: randn(EXAMPLES, *positions, 3)


def convolution(kind: type[_ConvNd], *, shift: bool, **geometry: Any) -> Case:
    """A shift of the inputs is none of the patches where zeros are among them."""
    groups = geometry.get("groups", 1)
    layer = kind(2 * groups, 2 * groups, **{"kernel_size": 2} | geometry)
    dims, has_bias = len(layer.kernel_size), layer.bias is not None
    net = Net(layer, 2 * groups, dims)
    inputs = change(2 * groups, groups, shift=shift)
    outputs = change(2 * groups, groups, shift=has_bias)
    other = net.between(inputs.frozen(dims), outputs)
    move(other.layer, inputs, outputs)
    return net, other, lambda: randn(EXAMPLES, 2 * groups, *(4, 3, 3)[:dims])


def table(kind: type[nn.Module]) -> Case:
    """Of the inputs, which are counts of tokens, the tokens may have other numbers."""
    net, outputs, numbers = Net(kind(5, 3), 3), change(3), torch.tensor([3, 0, 4, 1, 2])
    other = net.between(Renumber(numbers), outputs)
    rows = net.layer.weight.data @ outputs.matrices[0].T + outputs.offset
    other.layer.weight.data[numbers] = rows
    return net, other, lambda: torch.randint(0, 5, (EXAMPLES, 3))


def norm(layer: nn.Module, *size: int, absorbs: bool = False) -> Case:
    """Outputs in another scale in every channel; some absorb that of the inputs."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    dims = None if isinstance(layer, nn.LayerNorm | nn.RMSNorm) else len(size) - 1
    channels = layer.weight.numel()
    net, bias = Net(layer, channels, dims), getattr(layer, "bias", None)
    outputs = change(channels, channels, shift=bias is not None)
    before = change(channels, channels).frozen(dims) if absorbs else nn.Identity()
    other = net.between(before, outputs)
    with torch.no_grad():
        other.layer.weight.mul_(outputs.matrices.flatten())
        if bias is not None:
            other.layer.bias.mul_(outputs.matrices.flatten()).add_(outputs.offset.flatten())
    return net, other, lambda: randn(EXAMPLES, *size)


def attention(**settings: Any) -> Case:
    """Inputs, outputs, and what the heads compute with: M q and M⁻ᵀ k have the same products."""
    net = Attention(**settings)
    other = copy.deepcopy(net)
    att, names = other.att, ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = (
        att.in_proj_weight.detach().chunk(3)
        if att._qkv_same_embed_dim
        else [getattr(att, name).detach() for name in names]
    )
    queries, values = change(4, 2, shift=False), change(4, 2)
    keys = Map(queries.matrices.inverse().mT, queries.offset)
    heads = [
        Map(torch.block_diag(*part.matrices)[None], part.offset.reshape(1, -1))
        for part in (queries, keys, values)
    ]
    inputs, outputs = [change(width) for width in net.widths], change(4)
    biases = att.in_proj_bias.detach().chunk(3)
    for weight, bias, *maps in zip(weights, biases, inputs, heads, strict=True):
        new, new_bias = in_coordinates(weight[None, ..., None], bias, *maps)
        weight.copy_(new[0, ..., 0])
        bias.copy_(new_bias)
    move(att.out_proj, heads[2], outputs)
    other.before = nn.ModuleList(change.frozen(None) for change in inputs)
    other.after = outputs.inverse().frozen(None)
    return net, other, lambda: randn(EXAMPLES, 3, 4)


EXACT_EPS = 1e-14
CASES: dict[str, Callable[[], Case]] = {
    "Linear": linear,
    "Linear without bias": partial(linear, bias=False),
    "Linear on sequences": partial(linear, 3),
    "Linear on sequences of sequences": partial(linear, 2, 2),
    "Conv1d": partial(convolution, nn.Conv1d, shift=True),
    "Conv1d, zeros around": partial(convolution, nn.Conv1d, shift=False, kernel_size=3, padding=1),
    "Conv2d": partial(convolution, nn.Conv2d, shift=True),
    "Conv2d, zeros around": partial(convolution, nn.Conv2d, shift=False, kernel_size=3, padding=1),
    "Conv2d, repeated pixels around": partial(
        convolution, nn.Conv2d, shift=True, padding=1, padding_mode="replicate"
    ),
    "Conv2d, groups": partial(convolution, nn.Conv2d, shift=True, groups=2),
    "Conv2d without bias": partial(convolution, nn.Conv2d, shift=False, bias=False),
    "Conv3d": partial(convolution, nn.Conv3d, shift=True),
    "ConvTranspose1d, groups": partial(
        convolution, nn.ConvTranspose1d, shift=False, groups=2, padding=1
    ),
    "ConvTranspose2d, stride": partial(
        convolution, nn.ConvTranspose2d, shift=False, kernel_size=2, stride=2, padding=1
    ),
    "Embedding": partial(table, nn.Embedding),
    "EmbeddingBag": partial(table, nn.EmbeddingBag),
    "LayerNorm": lambda: norm(nn.LayerNorm(4), 3, 4),
    "RMSNorm": lambda: norm(nn.RMSNorm(4), 3, 4),
    "GroupNorm": lambda: norm(nn.GroupNorm(2, 4), 4, 3),
    "BatchNorm2d": lambda: norm(nn.BatchNorm2d(3, eps=EXACT_EPS), 3, 2, 3, absorbs=True),
}
# Singular under "reduce": the mean of what an instance norm returns is 0, and the sum of the keys'
# gradients, since a shift of all keys changes no attention.
EXPANDED: dict[str, Callable[[], Case]] = {
    "InstanceNorm2d": lambda: norm(
        nn.InstanceNorm2d(3, affine=True, eps=EXACT_EPS), 3, 2, 3, absorbs=True
    ),
    "attention": attention,
    "attention, separate projections": partial(attention, kdim=3, vdim=2),
}


# The step


def outputs_of_both(name: str, inverse: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """What the two nets compute of fresh inputs after some steps."""
    torch.manual_seed(0)
    net, other, sample = (CASES | EXPANDED)[name]()
    inputs, fresh, target = sample(), sample(), randn(EXAMPLES, CLASSES)
    torch.testing.assert_close(other(fresh), net(fresh), rtol=1e-9, atol=1e-9)
    before = net(fresh).detach()
    for model in (net, other):
        criterion = nn.MSELoss()
        settings = SETTINGS | {"damping": DAMPING[inverse], "inverse": inverse} | changes
        optimizer = KFAC(model, criterion=criterion, **settings)
        for _ in range(STEPS):
            optimizer.zero_grad()
            criterion(model(inputs), target).backward()
            optimizer.step()
    assert (net(fresh) - before).abs().max() > 0.01
    return net(fresh), other(fresh)


def check(name: str, inverse: str, **changes: Any) -> None:
    net, other = outputs_of_both(name, inverse, **changes)
    torch.testing.assert_close(other, net, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_depend_on_coordinates(name: str, sharing: str, inverse: str) -> None:
    check(name, inverse, weight_sharing=sharing)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("name", EXPANDED)
def test_a_step_with_positions_expanded_does_not_depend_on_coordinates(
    name: str, inverse: str
) -> None:
    check(name, inverse)


@pytest.mark.parametrize("name", ["Linear", "Linear on sequences", "Conv2d", "Embedding"])
def test_the_empirical_fisher_does_not_depend_on_coordinates_either(name: str) -> None:
    check(name, "eigen", fisher="empirical")


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
def test_ekfac_depends_on_coordinates(name: str) -> None:
    """It keeps a diagonal in the eigenbasis, and maps do not take eigenbases to eigenbases.

    What it drops off the diagonal is another matrix in other coordinates. On the first step its
    eigenvalues are still those of A ⊗ G, which is carried along as a whole.
    """
    net, other = outputs_of_both(name, "ekfac")
    assert (net - other).abs().max() > 1e-3


# Mutants


def without_constant(original: Callable, layer: LinearLayer, x: Tensor) -> Tensor:
    """A in which the bias' input is 0."""
    moment = original(layer, x)
    moment[:, -1] = moment[:, :, -1] = 0
    return moment


def of_identity(original: Callable, layer: LinearLayer, g: Tensor) -> Tensor:
    return torch.eye(layer.shape.d_out).to(g).expand_as(original(layer, g))


MUTANTS: dict[str, tuple[Callable, Callable]] = {
    "the bias has no input": (
        replace(LinearLayer, "input_moment", without_constant), partial(check, "Linear", "eigen")
    ),
    "G is the identity": (
        replace(LinearLayer, "gradient_moment", of_identity), partial(check, "Linear", "eigen")
    ),
    "A is centred": (
        replace(
            LinearLayer, "input_moment",
            lambda original, layer, x: original(layer, x - x.mean(0)),
        ),
        partial(check, "Linear", "cholesky"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = MUTANTS[name]
    test()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_damping_depends_on_coordinates(inverse: str) -> None:
    """So what the tests above find is not just insensitive."""
    with pytest.raises(AssertionError):
        check("Linear", inverse, damping=0.1)
