"""`curvature()` gives A ⊗ G as a matrix in the order of the parameters, compared with dense ones.

Where K-FAC is exact the dense matrix is Jᵀ H J from explicit Jacobians; elsewhere it is A ⊗ G
written out element by element.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import oracles
import pytest
import test_exactness as exactness
import torch
from mutants import Replacement, replace
from test_exactness import Problem, build, close, randn, start, train_step
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parameters_to_vector

import kfac.kronecker
from kfac import KFAC, Preconditioner
from kfac.curvature import Curvature
from kfac.kronecker import CurvatureBlocks, Eigendecomposition, KroneckerBlock
from kfac.layers.conv import ConvTransposeLayer

pytestmark = pytest.mark.usefixtures("no_blocks")

LAMBDA = 0.3


# Dense matrices, [p, p] in the order of `parameters_to_vector`


def ggn(problem: Problem, name: str) -> Tensor:
    """Jᵀ H J for the parameters of a layer of any type."""
    layer = problem.model.get_submodule(name)
    parameters = {f"{name}.{k}": p.detach() for k, p in layer.named_parameters()}
    jacobian = jacrev(lambda values: functional_call(problem.model, values, (problem.inputs,)))
    by_name, output = jacobian(parameters), problem.model(problem.inputs)
    rows = torch.cat([by_name[key].reshape(output.numel(), -1) for key in parameters], dim=1)
    return rows.T @ oracles.loss_hessian(output, problem.target, problem.criterion) @ rows


def group_of(layer: nn.Module) -> Tensor:
    """`[p]`: the group of each parameter; the first axis of weight and bias is split into them."""
    groups = (
        layer.weight.numel() if isinstance(layer, nn.LayerNorm) else getattr(layer, "groups", 1)
    )
    return torch.cat(
        [
            (torch.arange(len(p)) * groups // len(p)).repeat_interleave(p[0].numel())
            for p in layer.parameters()
        ]
    )


def exact_block(problem: Problem, name: str) -> Tensor:
    group = group_of(problem.model.get_submodule(name))
    return torch.where(group[:, None] == group, ggn(problem, name), 0.0)


def coordinates(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """`[p]` each: a parameter's group, its output and its input within the group; bias last."""
    groups, outputs, d_in = oracles.groups_of(layer), len(layer.weight), layer.weight[0].numel()
    size = outputs // groups
    found = [(o // size, o % size, i) for o in range(outputs) for i in range(d_in)]
    if layer.bias is not None:
        found += [(o // size, o % size, d_in) for o in range(outputs)]
    return torch.tensor(found).unbind(1)


def written_out(layer: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """A ⊗ G, zero between groups."""
    group, output, inputs = coordinates(layer)
    left = a[group[:, None], inputs[:, None], inputs]
    right = g[group[:, None], output[:, None], output]
    return torch.where(group[:, None] == group, left * right, 0.0)


def approximate_block(
    problem: Problem, name: str, *, limit: int = 1000, identity: bool = False
) -> Tensor:
    """The block from factors that are written out, those above `limit` by their diagonal."""
    seen = exactness.observe(problem, name)
    a = oracles.input_factor(seen, problem.sharing)
    g = oracles.exact_output_factor(seen, problem.sharing)
    if identity:
        g = oracles.identity_output_factor(seen)
    a, g = (f if f.shape[-1] <= limit else f.diagonal(0, 1, 2).diag_embed() for f in (a, g))
    return written_out(problem.model.get_submodule(name), a, g)


@dataclass
class Case:
    problem: Callable[[], Problem]
    dense: Callable[[Problem, str], Tensor] = exact_block
    settings: dict[str, Any] = field(default_factory=dict)


def transposed_convolution(**geometry: Any) -> Problem:
    model = nn.Sequential(
        nn.ConvTranspose1d(4, 6, **geometry),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    return Problem(model, randn(5, 4, 7), randn(5, 2), nn.MSELoss(), "reduce")


def embedding(**settings: Any) -> Problem:
    model = nn.Sequential(nn.Embedding(6, 3, **settings), nn.Linear(3, 2))
    tokens = torch.tensor([[0, 1, 1, 4], [5, 2, 0, 0], [1, 4, 4, 5]])  # there is no 3
    return Problem(model, tokens, randn(3, 4, 2), nn.MSELoss())


def convolution_net() -> Problem:
    return exactness.GENERAL["convolution, groups"]()


def diagonal(limit: int) -> Case:
    dense = partial(approximate_block, limit=limit)
    return Case(convolution_net, dense, {"max_factor_dim": limit})


CASES = {
    "Linear": Case(exactness.NETS["deep linear net"]),
    "Linear without bias": Case(exactness.NETS["deep linear net without bias"]),
    "one example, cross-entropy": Case(exactness.NETS["one example, cross-entropy"]),
    "sequences": Case(exactness.NETS["sequences"]),
    "Conv2d": Case(exactness.CONVOLUTIONS["2×3"]),
    "Conv2d, groups": Case(exactness.CONVOLUTIONS["groups"]),
    "Conv2d, groups without bias": Case(exactness.CONVOLUTIONS["groups without bias"]),
    "Conv2d, depthwise": Case(exactness.CONVOLUTIONS["depthwise"]),
    "ConvTranspose1d": Case(lambda: transposed_convolution(kernel_size=3)),
    "ConvTranspose1d, stride, groups": Case(
        lambda: transposed_convolution(kernel_size=3, stride=2, padding=1, groups=2)
    ),
    "LayerNorm": Case(
        lambda: Problem(
            nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)), randn(7, 5), randn(7, 3), nn.MSELoss()
        )
    ),
    "Embedding": Case(embedding),
    "Embedding, padding": Case(lambda: embedding(padding_idx=1)),
    "dense factors": Case(convolution_net, approximate_block),
    "A diagonal": diagonal(8),
    "A and G diagonal": diagonal(1),
    "forward-only": Case(
        convolution_net, partial(approximate_block, identity=True), {"fisher": "forward-only"}
    ),
}


def curvature(problem: Problem, **settings: Any) -> CurvatureBlocks:
    """The snapshot after one step, for which the parameters do not move."""
    optimizer, trained = start(problem, **{"fisher": "type-2", "lr": 0.0} | settings)
    train_step(optimizer, trained)
    return optimizer.curvature()


def blocks_of(name: str) -> list[tuple[KroneckerBlock, Tensor]]:
    """Every layer's block and the dense matrix that it must be."""
    torch.manual_seed(0)
    case = CASES[name]
    problem = case.problem()
    blocks = curvature(problem, **case.settings)
    assert len(blocks) > 1
    return [(block, case.dense(problem, layer)) for layer, block in blocks.items()]


def damped(dense: Tensor, damping: float = LAMBDA) -> Tensor:
    return dense + damping * torch.eye(len(dense), dtype=dense.dtype)


def inverse_root(dense: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(dense)
    return vectors @ values.rsqrt().diag() @ vectors.T


# The matrix


@pytest.mark.parametrize("name", CASES)
def test_to_dense_is_the_dense_matrix(name: str) -> None:
    for block, dense in blocks_of(name):
        assert block.shape == dense.shape
        close(block.to_dense(), dense)


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    for block, dense in blocks_of(name):
        for v in (randn(len(dense)), randn(len(dense), 1), randn(len(dense), 3)):
            close(block @ v, dense @ v)


@pytest.mark.parametrize("name", CASES)
def test_solves_are_those_of_the_damped_dense_matrix(name: str) -> None:
    for block, dense in blocks_of(name):
        for v in (randn(len(dense)), randn(len(dense), 3)):
            for damping in (LAMBDA, 1e-3):
                expected = torch.linalg.solve(damped(dense, damping), v)
                close(block.solve(v, damping), expected)


@pytest.mark.parametrize("name", CASES)
def test_sqrt_solves_are_by_the_symmetric_root(name: str) -> None:
    for block, dense in blocks_of(name):
        root = inverse_root(damped(dense))
        for v in (randn(len(dense)), randn(len(dense), 3)):
            close(block.sqrt_solve(v, LAMBDA), root @ v)


@pytest.mark.parametrize("name", CASES)
def test_traces_and_determinants_are_those_of_the_dense_matrix(name: str) -> None:
    pairs = blocks_of(name)
    traces = [dense.trace() for _, dense in pairs]
    logdets = [damped(dense).logdet() for _, dense in pairs]
    for (block, _), trace, logdet in zip(pairs, traces, logdets, strict=True):
        close(block.trace(), trace)
        close(block.logdet(LAMBDA), logdet)
    blocks = CurvatureBlocks({str(index): block for index, (block, _) in enumerate(pairs)})
    close(blocks.trace(), sum(traces))
    close(blocks.logdet(LAMBDA), sum(logdets))


def test_without_damping_a_regular_matrix_is_inverted() -> None:
    problem = Problem(nn.Sequential(nn.Linear(4, 3)), randn(9, 4), randn(9, 3), nn.MSELoss())
    block, dense = curvature(problem)["0"], ggn(problem, "0")
    v = randn(15)
    close(block.solve(v, 0), torch.linalg.solve(dense, v))
    close(block.sqrt_solve(v, 0.0), inverse_root(dense) @ v)
    close(block.logdet(0), dense.logdet())
    close(block @ block.solve(v, 0), v)


def test_eigenvalues_need_not_be_an_outer_product() -> None:
    module = nn.Conv2d(4, 6, 2, groups=2).double()
    (layer,) = Preconditioner(module).layers
    q_a, q_g = (torch.linalg.qr(randn(2, d, d))[0] for d in (9, 3))
    eigenvalues = randn(2, 3, 9).exp()
    block = KroneckerBlock(layer, Eigendecomposition(q_a, q_g, eigenvalues))
    group, output, inputs = coordinates(module)
    basis = torch.einsum("eo,ei->eoi", q_g[group, output], q_a[group, inputs])
    dense = torch.einsum("eoi,eoi,foi->ef", basis, eigenvalues[group], basis)
    dense = torch.where(group[:, None] == group, dense, 0.0)
    v = randn(len(dense), 2)
    close(block.to_dense(), dense)
    close(block @ v, dense @ v)
    close(block.solve(v, 0), torch.linalg.solve(dense, v))
    close(block.sqrt_solve(v, LAMBDA), inverse_root(damped(dense)) @ v)
    close(block.trace(), dense.trace())
    close(block.logdet(LAMBDA), damped(dense).logdet())


def test_a_data_set_in_batches_gives_its_curvature_at_fixed_parameters() -> None:
    problem = build(exactness.NETS, "deep linear net")
    model, criterion = copy.deepcopy(problem.model), nn.MSELoss()
    preconditioner = Preconditioner(model, criterion=criterion, fisher="type-2")
    for x, y in zip(problem.inputs.split(3), problem.target.split(3), strict=True):
        criterion(model(x), y).backward()
    preconditioner.step()
    for name, block in preconditioner.curvature().items():
        close(block.to_dense(), ggn(problem, name))
    assert all(map(torch.equal, model.parameters(), problem.model.parameters()))


# Vectors and tensors


@pytest.mark.parametrize(
    "name", ["Linear", "Conv2d, groups", "ConvTranspose1d", "LayerNorm", "Embedding"]
)
def test_vectors_are_in_the_order_of_parameters_to_vector(name: str) -> None:
    problem = build({name: CASES[name].problem}, name)
    for layer, block in curvature(problem).items():
        tensors = list(problem.model.get_submodule(layer).parameters())
        vector = block.flatten(tensors)
        assert torch.equal(vector, parameters_to_vector(tensors))
        assert all(map(torch.equal, block.unflatten(vector), tensors))
        assert block.shape == (len(vector), len(vector))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_rows_of_a_parameter_that_holds_several_layers_are_picked() -> None:
    problem = Problem(Attention(), randn(3, 5, 4), randn(3, 5, 4), nn.MSELoss())
    block = curvature(problem)["attention.k_proj"]
    tensors = [problem.model.attention.in_proj_weight, problem.model.attention.in_proj_bias]
    rows = [tensor[4:8] for tensor in tensors]
    vector = parameters_to_vector(rows)
    assert torch.equal(block.flatten(tensors), vector)
    assert torch.equal(block.flatten(rows), vector)
    assert all(map(torch.equal, block.unflatten(vector), rows))
    close(block @ vector, block.to_dense() @ vector)


def test_vectors_of_any_dtype_and_number_are_taken() -> None:
    for block, dense in blocks_of("Linear")[:1]:
        v = randn(len(dense), 2)
        for function in (block.__matmul__, partial(block.solve, damping=LAMBDA)):
            assert function(v.half()).dtype == torch.float64
            close(function(v.float()), function(v.float().double()))
            assert function(v[:, :0]).shape == (len(dense), 0)
            close(function(v.T.contiguous().T), function(v))
        assert block.flatten([p.float() for p in block.unflatten(v[:, 0])]).dtype == torch.float64


def test_nothing_is_recorded_for_autograd() -> None:
    for block, dense in blocks_of("Conv2d, groups"):
        v = randn(len(dense)).requires_grad_()
        results = [
            block @ v,
            block.solve(v, LAMBDA),
            block.sqrt_solve(v, LAMBDA),
            block.trace(),
            block.logdet(LAMBDA),
            block.to_dense(),
            block.flatten(block.unflatten(v)),
            *block.unflatten(v),
        ]
        assert not any(result.requires_grad for result in results)


def test_products_keep_their_precision_under_autocast() -> None:
    model = nn.Linear(20, 3)
    optimizer = KFAC(model, lr=0.1)
    model(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
    v, plain, cast = torch.randn(63), optimizer.curvature()[""], optimizer.curvature()[""]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast @ v, plain @ v)
        results = cast.solve(v, LAMBDA), cast.logdet(LAMBDA), cast.to_dense()
    assert torch.equal(results[0], plain.solve(v, LAMBDA))
    assert torch.equal(results[1], plain.logdet(LAMBDA))
    assert torch.equal(results[2], plain.to_dense())


# A snapshot


def test_later_steps_leave_a_snapshot_as_it_is() -> None:
    optimizer, trained = start(build(exactness.NETS, "deep linear net"))
    train_step(optimizer, trained)
    blocks = optimizer.curvature()
    v = {name: randn(block.shape[0]) for name, block in blocks.items()}
    dense = {name: block.to_dense() for name, block in blocks.items()}
    train_step(optimizer, trained)
    for name, later in optimizer.curvature().items():
        assert not torch.equal(later.to_dense(), dense[name])
        assert torch.equal(blocks[name].to_dense(), dense[name])
        expected = torch.linalg.solve(damped(dense[name]), v[name])
        close(blocks[name].solve(v[name], LAMBDA), expected)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_without_statistics_is_not_in_it() -> None:
    model = Branches()
    optimizer = KFAC(model, lr=0.1)
    assert len(optimizer.curvature()) == 0
    assert optimizer.curvature().trace() == optimizer.curvature().logdet(1.0) == 0
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    blocks = optimizer.curvature()
    assert list(blocks) == ["used"]
    assert "unused" not in blocks
    with pytest.raises(KeyError, match="'unused' has no statistics yet"):
        blocks["unused"]
    with pytest.raises(KeyError, match="No layer 'head' under K-FAC; there are used"):
        blocks["head"]


def test_a_layer_whose_statistics_were_all_dropped_is_not_in_it() -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, lr=0.1)
    model(torch.full((4, 3), float("nan"))).square().mean().backward()
    optimizer.step()
    assert len(optimizer.curvature()) == 0


# Errors


ERRORS: dict[str, tuple[Callable[[KroneckerBlock], object], str]] = {
    "short vector": (
        lambda block: block @ torch.zeros(3),
        r"KroneckerBlock.__matmul__\(v=...\) must be a tensor of shape \[24\] or \[24, k\], but "
        r"got \(3,\). The layer is '0'.",
    ),
    "row": (lambda block: block.solve(torch.zeros(1, 24), 1.0), r"solve\(v=...\).* \(1, 24\)"),
    "scalar": (lambda block: block @ torch.zeros(()), r"but got \(\)"),
    "three dimensions": (lambda block: block @ torch.zeros(24, 1, 1), r"but got \(24, 1, 1\)"),
    "a number": (lambda block: block.sqrt_solve(1.0, 1.0), r"sqrt_solve\(v=...\).* but got 1.0"),
    "negative damping": (
        lambda block: block.solve(torch.zeros(24), -1),
        r"KroneckerBlock.solve\(damping=...\) must be a finite number >= 0, but got -1.",
    ),
    "infinite damping": (lambda block: block.logdet(float("inf")), "finite number >= 0"),
    "damping as a string": (lambda block: block.logdet("1"), "finite number >= 0, but got '1'"),
    "unflatten": (
        lambda block: block.unflatten(torch.zeros(24, 1)),
        r"unflatten\(vector=...\) must be a tensor of shape \[24\], but got \(24, 1\)",
    ),
    "flatten, shape": (
        lambda block: block.flatten([torch.zeros(5, 4), torch.zeros(4)]),
        r"flatten\(tensors=...\) must be tensors of the shapes \[\(4, 5\), \(4,\)\], but got "
        r"\[\(5, 4\), \(4,\)\].",
    ),
    "flatten, number": (lambda block: block.flatten([torch.zeros(4, 5)]), r"got \[\(4, 5\)\]"),
    "flatten, too many": (
        lambda block: block.flatten([torch.zeros(4, 5), torch.zeros(4), torch.zeros(4)]),
        r"\(4,\), \(4,\)\]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_bad_argument_is_an_error(name: str) -> None:
    call, message = ERRORS[name]
    block = curvature(build(exactness.NETS, "deep linear net"))["0"]
    with pytest.raises(ValueError, match=message):
        call(block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["solve", "sqrt_solve", "logdet"])
def test_a_singular_matrix_needs_damping(method: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    optimizer = KFAC(model, lr=0.1)
    for _ in range(3):  # more directions than one batch of two has, fewer than there are
        optimizer.zero_grad()
        model(torch.randn(2, 5, dtype=dtype)).square().mean().backward()
        optimizer.step()
    block = optimizer.curvature()["2"]
    arguments = [] if method == "logdet" else [torch.zeros(123, dtype=dtype)]
    message = rf"{method}\(damping=...\) must be > 0 for a singular .* 0. The layer is '2'. F has"
    with pytest.raises(ValueError, match=message):
        getattr(block, method)(*arguments, 0)
    assert getattr(block, method)(*arguments, 1e-3).isfinite().all()


# Planted bugs


def transposed_basis(
    original: Replacement, factor: Tensor, rows: int
) -> tuple[Tensor, Tensor | None]:
    values, vectors = original(factor, rows)
    return values, None if vectors is None else vectors.mT


def bias_first(original: Replacement, self: KroneckerBlock) -> Tensor:
    size = self._layer.bias.size if self._layer.bias is not None else 0
    return (original(self) + size) % self.shape[0]


def groups_once(original: Replacement, self: KroneckerBlock, damping: float) -> Tensor:
    return original(self, damping) / self._layer.shape.groups


def views(original: Replacement, self: Curvature, layer: str) -> tuple[Tensor, Tensor]:
    bucket, index = self._slots[layer]
    return bucket.factors["A"][index], bucket.factors["G"][index]


def unflipped(original: Replacement, self: ConvTransposeLayer, weight: Tensor, bias: Any) -> Tensor:
    return original(self, weight.flip(-1), bias)


SOLVES = test_solves_are_those_of_the_damped_dense_matrix
DETERMINANTS = test_traces_and_determinants_are_those_of_the_dense_matrix
DENSE = test_to_dense_is_the_dense_matrix

# name: (the mutant, the test that catches it, that test's arguments)
MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable, tuple]] = {
    "Q where Qᵀ belongs": (
        replace(kfac.kronecker, "_eigendecomposed", transposed_basis),
        SOLVES,
        ("Linear",),
    ),
    "eigenvalues damped twice": (
        replace(
            KroneckerBlock,
            "_damped",
            lambda original, self, method, damping: original(self, method, damping) + damping,
        ),
        SOLVES,
        ("Linear",),
    ),
    "logdet damped twice": (
        replace(
            KroneckerBlock,
            "_damped",
            lambda original, self, method, damping: original(self, method, damping) + damping,
        ),
        DETERMINANTS,
        ("Linear",),
    ),
    "bias first": (replace(KroneckerBlock, "_positions", bias_first), DENSE, ("Linear",)),
    "logdet counts one group": (
        replace(KroneckerBlock, "logdet", groups_once),
        DETERMINANTS,
        ("Conv2d, groups",),
    ),
    "solve instead of sqrt_solve": (
        replace(
            KroneckerBlock,
            "sqrt_solve",
            lambda original, self, v, damping: self.solve(v, damping),
        ),
        test_sqrt_solves_are_by_the_symmetric_root,
        ("Linear",),
    ),
    "a snapshot of views": (
        replace(Curvature, "factor", views),
        test_later_steps_leave_a_snapshot_as_it_is,
        (),
    ),
    "kernel of a transposed convolution not flipped": (
        replace(ConvTransposeLayer, "matrix", unflipped),
        DENSE,
        ("ConvTranspose1d, stride, groups",),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test, arguments = MUTANTS[name]
    test(*arguments)  # passes as it is
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*arguments)
