"""Precision: autocast, low-precision and float64 weights, gradient scalers, and torch's flags."""

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac
from kfac import KFAC

HALVES = [torch.float16, torch.bfloat16]
FISHERS = ["empirical", "mc", "type-2", "forward-only"]
INVERSES = ["cholesky", "eigen", "ekfac", "newton-schulz", "inverse-free"]
MODES = [
    *({"fisher": fisher} for fisher in FISHERS),
    *({"inverse": inverse} for inverse in INVERSES[1:]),
]
AUTOMATIC = [
    {"lr": "auto", "momentum": "auto", "damping": kfac.LevenbergMarquardt(), "inverse": inverse}
    for inverse in ("cholesky", "eigen", "ekfac", "newton-schulz")
]
PERIODS: dict[str, Any] = {"factor_update_period": 2, "inverse_update_period": 4}
N = 32


def name(settings: Any) -> str:
    """Of a test's case."""
    values = settings.values() if isinstance(settings, dict) else [settings]
    return "-".join(str(value) for value in values if isinstance(value, str | torch.dtype))


def classifier() -> nn.Sequential:
    """Layers of three kinds."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Examples of four classes that are easy to tell."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(N) % 4
    patterns = torch.randn(4, 1, 6, 6, generator=draw)
    return patterns[y] + 0.5 * torch.randn(N, 1, 6, 6, generator=draw), y


def train(
    model: nn.Module,
    optimizer: KFAC,
    criterion: nn.Module,
    steps: int,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Takes steps on one batch; returns their losses."""
    x, y = batch()
    x = x.to(next(model.parameters()).dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss: Tensor = criterion(model(x), y)
        loss.backward()
        return loss

    return [float(optimizer.step(closure).detach()) for _ in range(steps)]


def factors(optimizer: KFAC) -> list[Tensor]:
    layers = optimizer.state_dict()["kfac"]["layers"].values()
    return [factor for layer in layers for factor in layer["factors"].values()]


def inverses(optimizer: KFAC) -> list[Tensor]:
    layers = optimizer.state_dict()["kfac"]["layers"].values()
    return [tensor for layer in layers for tensor in layer["inverse"].values()]


# --- autocast ----------------------------------------------------------------------------------


@pytest.mark.promise("autocast in float16 or bfloat16")
@pytest.mark.parametrize("dtype", HALVES, ids=name)
@pytest.mark.parametrize("settings", [*MODES, *AUTOMATIC], ids=name)
def test_training_under_autocast_learns_with_factors_in_float32(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **PERIODS, **({"lr": 0.1} | settings))
    losses = train(model, optimizer, criterion, 20, autocast=dtype)
    assert losses[-1] < 0.7 * losses[0]
    assert {t.dtype for t in [*factors(optimizer), *model.parameters()]} == {torch.float32}
    assert all(t.isfinite().all() for t in [*factors(optimizer), *inverses(optimizer)])


def reference_factors(model: nn.Sequential, x: Tensor, y: Tensor, fisher: str) -> list[Tensor]:
    """A and G of two linear layers with a tanh between them, by the definition, in float64."""
    first, last = copy.deepcopy(model[0]).double(), copy.deepcopy(model[2]).double()
    x = x.double()
    hidden = torch.tanh(first(x))
    p = last(hidden).softmax(1).detach()
    if fisher == "empirical":
        roots = [p - F.one_hot(y, 3)]
    else:  # the columns of a root of diag(p) − ppᵀ, for every example
        roots = list((p.sqrt().diag_embed() - p[:, :, None] * p.sqrt()[:, None, :]).unbind(2))
    found = {"A0": _second_moment(x), "A1": _second_moment(hidden)}
    derivative = 1 - hidden**2
    back = [(root @ last.weight) * derivative for root in roots]
    found["G0"] = sum(g.T @ g for g in back) / len(x)
    found["G1"] = sum(root.T @ root for root in roots) / len(x)
    return [found[key].detach() for key in ("A0", "G0", "A1", "G1")]


def _second_moment(x: Tensor) -> Tensor:
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return rows.T @ rows / len(rows)


def measured_factors(optimizer: KFAC) -> list[Tensor]:
    found = []
    for layer in ("0", "2"):
        a, g = optimizer.factor(layer)
        assert a is not None
        assert g is not None
        found += [a.squeeze(0), g.squeeze(0)]
    return found


@pytest.mark.promise("autocast in float16 or bfloat16")
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=name)
def test_factors_are_as_exact_as_the_numbers_that_the_model_computes_with(
    fisher: Any, dtype: torch.dtype
) -> None:
    model, criterion = (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        nn.CrossEntropyLoss(),
    )
    x, y = torch.randn(N, 5), torch.arange(N) % 3
    expected = reference_factors(model, x, y, fisher)
    optimizer = KFAC(model, criterion=criterion, fisher=fisher, lr=0.1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    for factor, reference in zip(measured_factors(optimizer), expected, strict=True):
        assert factor.dtype == torch.float32
        error = (factor.double() - reference).norm() / reference.norm()
        assert error < 4 * torch.finfo(dtype).eps


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.promise("weights in bfloat16 or float16")
@pytest.mark.parametrize("dtype", HALVES, ids=name)
@pytest.mark.parametrize("settings", [*MODES, AUTOMATIC[0]], ids=name)
def test_low_precision_weights_learn_with_factors_in_float32(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model, criterion = classifier().to(dtype), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **PERIODS, **({"lr": 0.1} | settings))
    losses = train(model, optimizer, criterion, 20)
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {t.dtype for t in [*factors(optimizer), *inverses(optimizer)]} == {torch.float32}
    assert all(t.isfinite().all() for t in [*factors(optimizer), *inverses(optimizer)])


@pytest.mark.promise("weights in float64")
@pytest.mark.parametrize("settings", [*MODES, *AUTOMATIC], ids=name)
def test_float64_weights_have_everything_in_float64(settings: dict[str, Any]) -> None:
    model, criterion = classifier().double(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **PERIODS, **({"lr": 0.1} | settings))
    losses = train(model, optimizer, criterion, 10)
    assert losses[-1] < losses[0]
    momentum = [t for state in optimizer.state.values() for t in state.values()]
    found = [*model.parameters(), *factors(optimizer), *inverses(optimizer), *momentum]
    assert {t.dtype for t in found} == {torch.float64}


@pytest.mark.promise("`model.to(device)` and `model.to(dtype)` before the first step")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name)
def test_factors_follow_the_weights_and_are_at_least_float32(dtype: torch.dtype) -> None:
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, lr=0.1, **PERIODS)
    model.to(dtype)
    losses = train(model, optimizer, criterion, 20)
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in [*factors(optimizer), *inverses(optimizer)]} == {expected}


# --- gradient scalers --------------------------------------------------------------------------


def scaled_step(
    model: nn.Module,
    optimizer: KFAC,
    criterion: nn.Module,
    scaler: torch.amp.GradScaler,
    *,
    clip: bool,
    dtype: torch.dtype | None = torch.float16,
    factor: float = 1.0,
) -> None:
    """One step as in torch's recipe; ``factor`` multiplies the loss."""
    x, y = batch()
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype or torch.float16, enabled=dtype is not None):
        loss = criterion(model(x), y) * factor
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.promise("`GradScaler`, with or without `unscale_` and clipping")
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("settings", MODES, ids=name)
def test_float16_training_with_a_scaler_learns(settings: dict[str, Any], clip: bool) -> None:
    scaler = torch.amp.GradScaler("cpu")
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, lr=0.1, grad_scaler=scaler, **PERIODS, **settings)
    x, y = batch()
    before = criterion(model(x), y).item()
    for _ in range(20):
        scaled_step(model, optimizer, criterion, scaler, clip=clip)
    with torch.no_grad():
        assert criterion(model(x), y).item() < 0.7 * before
    assert all(factor.isfinite().all() for factor in factors(optimizer))


@pytest.mark.promise("`GradScaler`, with or without `unscale_` and clipping")
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
def test_factors_do_not_depend_on_the_scale_nor_on_clipping(fisher: Any, clip: bool) -> None:
    model, criterion = (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        nn.CrossEntropyLoss(),
    )
    x, y = torch.randn(N, 5), torch.arange(N) % 3
    expected = reference_factors(model, x, y, fisher)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = KFAC(model, criterion=criterion, fisher=fisher, lr=0.1, grad_scaler=scaler)
    with torch.autocast("cpu", torch.float16):
        loss = criterion(model(x), y)
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    for factor, reference in zip(measured_factors(optimizer), expected, strict=True):
        error = (factor.double() - reference).norm() / reference.norm()
        assert error < 4 * torch.finfo(torch.float16).eps


def everything(model: nn.Module, optimizer: KFAC) -> list[Any]:
    """Parameters, buffers and whatever the optimizer keeps between steps, as plain leaves."""
    found: list[Any] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                collect(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)
        else:
            found.append(value.clone() if isinstance(value, Tensor) else value)

    collect(model.state_dict())
    collect(optimizer.state_dict())
    collect(dict(optimizer.diagnostics()))
    return found


def is_same(one: list[Any], other: list[Any]) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


OVERFLOWS: list[dict[str, Any]] = [
    *MODES,
    {"fisher": "mc", "fallback": "adamw", "skip": ["0"]},
    {"fisher": "mc", "graft": "adam"},
    {"fisher": "mc", "refresh_tolerance": 0.1},
    {"fisher": "mc", "burn_in": 6},
]


@pytest.mark.promise("a step that overflows")
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("settings", OVERFLOWS, ids=name)
def test_an_overflow_leaves_everything_as_it_was(settings: dict[str, Any], clip: bool) -> None:
    """Also later: the run goes on as if there had been no such batch, to the bit."""
    ends = []
    for overflow in (False, True):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model, criterion = classifier(), nn.CrossEntropyLoss()
        optimizer = KFAC(
            model, criterion=criterion, lr=0.1, grad_scaler=scaler, **PERIODS, **settings
        )
        for i in range(5):
            scaled_step(model, optimizer, criterion, scaler, clip=clip, dtype=None)
            if overflow and i in (1, 2):  # where factors are due, and where they are not
                before, scale = everything(model, optimizer), scaler.get_scale()
                scaled_step(
                    model, optimizer, criterion, scaler, clip=clip, dtype=None, factor=torch.inf
                )
                assert is_same(everything(model, optimizer), before)
                assert scaler.get_scale() == scale / 2
        ends.append(everything(model, optimizer))
    assert is_same(*ends)


@pytest.mark.promise("a step that overflows")
def test_an_overflow_of_float16_itself_is_skipped_until_the_scale_fits() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, lr=0.1, grad_scaler=scaler, **PERIODS)
    before = everything(model, optimizer)
    scaled_step(model, optimizer, criterion, scaler, clip=False)
    assert is_same(everything(model, optimizer), before)
    assert scaler.get_scale() == 2.0**23
    for _ in range(20):
        scaled_step(model, optimizer, criterion, scaler, clip=False)
    assert not is_same(everything(model, optimizer), before)
    assert all(t.isfinite().all() for t in [*model.parameters(), *factors(optimizer)])


@pytest.mark.promise("several optimizers with one `GradScaler`")
def test_an_overflow_of_one_model_stops_only_its_own_optimizer() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    models, criterion = [classifier(), classifier()], nn.CrossEntropyLoss()
    optimizers = [
        KFAC(m, criterion=criterion, lr=0.1, grad_scaler=scaler, **PERIODS) for m in models
    ]
    x, y = batch()
    moved = []
    for factors in ((1.0, 1.0), (1.0, torch.inf), (torch.inf, 1.0), (1.0, 1.0)):
        before = [everything(*pair) for pair in zip(models, optimizers, strict=True)]
        for model, optimizer, factor in zip(models, optimizers, factors, strict=True):
            optimizer.zero_grad()
            scaler.scale(criterion(model(x), y) * factor).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        after = [everything(*pair) for pair in zip(models, optimizers, strict=True)]
        moved.append([not is_same(*pair) for pair in zip(before, after, strict=True)])
    assert moved == [[True, True], [True, False], [False, True], [True, True]]


# --- torch's flags -----------------------------------------------------------------------------


def flags() -> dict[str, Any]:
    """What decides how torch computes."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "matmul precision": torch.get_float32_matmul_precision(),
        "TF32 in matrix products": cuda.matmul.allow_tf32,
        "TF32 in convolutions": cudnn.allow_tf32,
        "float16 sums": cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bfloat16 sums": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "oneDNN": torch.backends.mkldnn.enabled,
        "linear algebra": cuda.preferred_linalg_library(),
        "attention": (
            cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "gradients": torch.is_grad_enabled(),
        "flush denormals": _flushes_denormals(),
    }  # fmt: skip


def _flushes_denormals() -> bool:
    return bool(torch.tensor(1e-40) * 1.0 == 0.0)


@pytest.fixture
def tf32() -> Any:
    """Sets the flags for TF32, and sets them back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def set_to(precision: str, convolutions: bool) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions

    yield set_to
    set_to(*before)


@pytest.mark.promise("TF32")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("settings", [{"inverse": "eigen"}, AUTOMATIC[0]], ids=name)
def test_no_flag_of_torch_changes(
    tf32: Callable[[str, bool], None], precision: str, convolutions: bool, settings: dict[str, Any]
) -> None:
    tf32(precision, convolutions)
    before = flags()
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **PERIODS, **settings)
    assert flags() == before
    train(model, optimizer, criterion, 2)
    assert flags() == before
    optimizer.curvature().logdet(0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.summary()
    assert flags() == before
    optimizer.remove_hooks()
    assert flags() == before


SETTERS = {
    "set_float32_matmul_precision", "set_default_dtype", "set_default_device", "set_num_threads",
    "use_deterministic_algorithms", "set_flush_denormal", "preferred_linalg_library",
    "manual_seed", "manual_seed_all", "set_flags", "set_deterministic_debug_mode",
    "enable_flash_sdp", "enable_math_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp",
}  # fmt: skip


def setters(source: str) -> list[str]:
    """Calls that set a flag of torch's, and assignments to an attribute of torch's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_own = called.startswith("torch.Generator(")
            if called.startswith("torch.") and called.split(".")[-1] in SETTERS and not is_own:
                found.append(called)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets if isinstance(node, ast.Assign | ast.AugAssign) else []:
            if ast.unparse(target).startswith("torch."):
                found.append(ast.unparse(target))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [alias.name for alias in node.names if alias.name in SETTERS]
    return found


def test_setters_are_found() -> None:
    source = (
        "torch.backends.cuda.matmul.allow_tf32 = True\n"
        "torch.set_float32_matmul_precision('high')\n"
        "from torch import set_num_threads\n"
        "torch.Generator().manual_seed(0)\n"
        "x = torch.backends.cudnn.allow_tf32\n"
    )
    assert sorted(setters(source)) == [
        "set_num_threads", "torch.backends.cuda.matmul.allow_tf32",
        "torch.set_float32_matmul_precision",
    ]  # fmt: skip


@pytest.mark.promise("TF32")
@pytest.mark.parametrize(
    "path", sorted(Path(kfac.__file__).parent.rglob("*.py")), ids=lambda path: path.stem
)
def test_the_package_sets_no_flag_of_torch(path: Path) -> None:
    assert setters(path.read_text()) == []
