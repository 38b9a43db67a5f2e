"""What cannot work is reported before a step changes anything, with what to do about it."""

import copy
import gc
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kfac import KFAC, LevenbergMarquardt, Preconditioner

NAN, INF = float("nan"), float("inf")
_RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 4, generator=_RANDOM), torch.randint(3, (8,), generator=_RANDOM)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.PReLU())


def train(model: nn.Module, optimizer: Any, steps: int = 1, x: Tensor = X, y: Tensor = Y) -> None:
    criterion = nn.CrossEntropyLoss()
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Parameters, buffers and the optimizer's whole state, copied."""
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def assert_same(mine: Any, theirs: Any) -> None:
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same(mine[key], theirs[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(mine, Tensor):
        assert torch.equal(mine, theirs)
    else:
        assert mine == theirs


# --- settings that are edited in a group ----------------------------------------------------------

EDITS: list[tuple[str, Any]] = [
    *[("lr", value) for value in (NAN, INF, -0.1, "0.1", None, [0.1], True, "auto")],
    *[("lr", torch.tensor(value)) for value in (NAN, -1.0, [0.1, 0.1], True, 1j)],
    *[("momentum", value) for value in (NAN, 1.0, -0.1, "0.9", None, True, "auto")],
    *[("weight_decay", value) for value in (NAN, INF, -1e-4, "0", None, True)],
    *[("damping", value) for value in (NAN, INF, 0.0, -1.0, "auto", None, True)],
    *[("nesterov", value) for value in (1, None, "yes", NAN)],
    *[("maximize", value) for value in (1, None, "yes", NAN)],
]


@pytest.mark.promise("settings edited in `param_groups`")
@pytest.mark.parametrize(("key", "value"), EDITS, ids=[f"{k}={v!r}" for k, v in EDITS])
def test_a_bad_edit_of_a_group_is_refused_and_changes_nothing(key: str, value: Any) -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1, fisher="empirical", factor_update_period=2)
    train(model, optimizer, steps=2)
    model(X).square().mean().backward()
    good = optimizer.param_groups[0][key]
    before = everything(model, optimizer)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=rf"KFAC\({key}=\.\.\.\) must be .*, but got") as info:
        optimizer.step()
    assert str(info.value).rstrip().endswith(("set it right there.", "pass it to KFAC."))
    optimizer.param_groups[0][key] = good
    assert_same(everything(model, optimizer), before)
    optimizer.step()


@pytest.mark.promise("settings edited in `param_groups`")
@pytest.mark.parametrize(
    "edit", [{"nesterov": True}, {"maximize": True}, {"lr": NAN}, {"momentum": "0.9"}]
)
def test_a_bad_edit_of_a_group_with_automatic_steps_comes_before_the_closure(
    edit: dict[str, Any],
) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr="auto", damping=LevenbergMarquardt(), criterion=criterion)
    optimizer.param_groups[0].update(edit)
    with pytest.raises(ValueError, match=rf"KFAC\({next(iter(edit))}=\.\.\.\) must be"):
        optimizer.step(lambda: pytest.fail("the closure was called"))


@pytest.mark.promise("settings edited in `param_groups`")
def test_a_deleted_setting_is_refused() -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1)
    del optimizer.param_groups[0]["weight_decay"]
    with pytest.raises(ValueError, match=r"weight_decay=\.\.\.\) must be .* but got None"):
        train(model, optimizer)


@pytest.mark.promise("settings edited in `param_groups`")
def test_nesterov_without_momentum_is_refused_when_it_is_edited_too() -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1, nesterov=True)
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="nesterov"):
        train(model, optimizer)


@pytest.mark.promise("settings edited in `param_groups`")
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), 0, torch.tensor(0.1), torch.tensor([0.1])])
def test_zero_and_tensors_are_learning_rates(lr: Any) -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1, kl_clip=None)
    train(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = lr
    train(model, optimizer)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert any(moved) is (float(lr) > 0)


@pytest.mark.promise("settings edited in `param_groups`")
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("value", [NAN, INF, -INF, -0.1])
def test_a_bad_rate_that_is_not_read_makes_a_step_that_is_not_taken(
    value: float, kl_clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where reading it would wait for the device."""
    monkeypatch.setattr("kfac.optimizer.check_in_use", lambda *_, **__: None)
    model = net()
    optimizer = KFAC(model, lr=0.1, kl_clip=kl_clip, weight_decay=0.1)
    train(model, optimizer, steps=2)
    before = everything(model, optimizer)
    optimizer.param_groups[0]["lr"] = torch.tensor(value)
    train(model, optimizer)
    after = everything(model, optimizer)
    assert_same(after["model"], before["model"])
    assert_same(after["optimizer"]["state"], before["optimizer"]["state"])
    assert optimizer.diagnostics()["nonfinite_batches"] == 1


@pytest.mark.promise("settings edited in `param_groups`")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rate_on_the_gpu_is_not_waited_for() -> None:
    model, x, y = net().cuda(), X.cuda(), Y.cuda()
    optimizer = KFAC(model, lr=torch.tensor(0.1, device="cuda"), factor_update_period=100)
    train(model, optimizer, x=x, y=y)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"].fill_(NAN)
    nn.functional.cross_entropy(model(x), y).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.promise("keys of parameter groups")
@pytest.mark.parametrize("added_later", [False, True])
@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("weight_deacy", "Did you mean 'weight_decay'"),
        ("Momentum", "Did you mean 'momentum'"),
        ("learning_rate", "argument of KFAC"),
        ("betas", "argument of KFAC"),
        ("factor_decay", "argument of KFAC"),
    ],
)
def test_an_unknown_key_of_a_group_is_refused(key: str, remedy: str, added_later: bool) -> None:
    model = net()
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight], key: 0.1}]
    message = rf"groups that set only damping.*{key}.*{remedy}"
    if not added_later:
        with pytest.raises(ValueError, match=message):
            KFAC(model, groups, lr=0.1)
        return
    optimizer = KFAC(model, groups[:1], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1


@pytest.mark.promise("keys of parameter groups")
def test_keys_of_schedulers_and_loggers_are_kept() -> None:
    model = net()
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(other, max_lr=1.0, total_steps=5)
    extra = {k: v for k, v in other.param_groups[0].items() if k.endswith(("_lr", "_momentum"))}
    assert len(extra) == 5
    extra |= {"name": "all", "lr_scale": 0.5, "swa_lr": 0.1}
    optimizer = KFAC(model, [{"params": list(model.parameters()), **extra}], lr=0.1)
    assert extra.items() <= optimizer.param_groups[0].items()


# --- parameters and modules -----------------------------------------------------------------------


def with_weight(weight: Tensor) -> nn.Module:
    model = nn.Module()
    model.odd = nn.Parameter(weight)
    return nn.Sequential(nn.Linear(4, 4), model)


def both(model: nn.Module, **settings: Any) -> list[Callable[[], Any]]:
    return [lambda: KFAC(model, lr=0.1, **settings), lambda: Preconditioner(model, **settings)]


KINDS: list[tuple[str, Callable[[], nn.Module], str, str]] = [
    (
        "complex, float8 or sparse parameters",
        lambda: with_weight(torch.zeros(2, dtype=torch.complex64)),
        "'1.odd' of dtype torch.complex64",
        "Convert it to one of torch.float32, .*leave it out of params=",
    ),
    (
        "complex, float8 or sparse parameters",
        lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn),
        "'weight' of dtype torch.float8_e4m3fn",
        "Convert it to one of torch.float32",
    ),
    (
        "complex, float8 or sparse parameters",
        lambda: with_weight(torch.eye(2).to_sparse()),
        "'1.odd' of layout torch.sparse_coo",
        "Make it dense",
    ),
    (
        "`sparse=True` embeddings",
        lambda: nn.Sequential(nn.Embedding(4, 2, sparse=True)),
        "'0', a Embedding",
        "sparse=False.*leave it out of params=",
    ),
    (
        "`sparse=True` embeddings",
        lambda: nn.EmbeddingBag(4, 2, sparse=True, mode="sum"),
        "a EmbeddingBag",
        "sparse=False",
    ),
    (
        "`DataParallel`",
        lambda: replicating(nn.Sequential(nn.Linear(2, 2))),
        "a DataParallel",
        "DistributedDataParallel, or device_ids",
    ),
    ("models without parameters", lambda: nn.ReLU(), "a ReLU without any", "nothing to train"),
]


def replicating(model: nn.Module) -> nn.Module:
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]  # as with two GPUs
    return wrapped


@pytest.mark.parametrize("owner", [0, 1], ids=["KFAC", "Preconditioner"])
@pytest.mark.parametrize(
    ("make", "value", "remedy"),
    [pytest.param(*row, marks=pytest.mark.promise(promise), id=row[1]) for promise, *row in KINDS],
)
def test_what_cannot_be_trained_is_refused_at_construction(
    make: Callable[[], nn.Module], value: str, remedy: str, owner: int
) -> None:
    with pytest.raises(ValueError, match=rf"must be .*, but got .*{value}.*{remedy}"):
        both(make())[owner]()


@pytest.mark.promise("parameters on `meta`")
@pytest.mark.parametrize("owner", [0, 1], ids=["KFAC", "Preconditioner"])
def test_a_model_on_meta_can_be_looked_at_but_not_trained(owner: int) -> None:
    model = net().to("meta")
    optimizer = both(model)[owner]()
    assert optimizer.memory_estimate()["factors"] > 0
    model.to_empty(device="cpu")
    model(X).square().mean().backward()  # of new parameters, which the optimizer does not know
    with pytest.raises(ValueError, match=r"model=\.\.\.\) must be in memory .*to_empty.*before"):
        optimizer.step()


@pytest.mark.promise("complex, float8 or sparse parameters")
def test_frozen_parameters_may_be_of_any_kind() -> None:
    model = with_weight(torch.zeros(2, dtype=torch.complex64)).requires_grad_(False)
    model[0].requires_grad_(True)
    assert len(KFAC(model, lr=0.1).summary()) == 3


@pytest.mark.promise("complex, float8 or sparse parameters")
def test_they_are_refused_when_they_are_unfrozen() -> None:
    model = with_weight(torch.zeros(2, dtype=torch.complex64))
    model[1].requires_grad_(False)
    optimizer = KFAC(model, lr=0.1)
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match="complex64"):
        optimizer.update_layers()


@pytest.mark.promise("`sparse=True` embeddings")
def test_a_sparse_embedding_that_is_left_out_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    KFAC(model, model[1].parameters(), lr=0.1)


@pytest.mark.promise("`DataParallel`")
def test_data_parallel_that_only_forwards_works() -> None:
    plain = net()
    wrapped = nn.DataParallel(copy.deepcopy(plain))
    for model in (plain, wrapped):
        train(model, KFAC(model, lr=0.1), steps=3)
    for mine, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.promise("FSDP and tensor parallelism")
def test_sharded_models_are_refused() -> None:
    program = """
        import warnings, torch
        from torch import nn
        import torch.distributed as dist
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
        from torch.distributed.tensor import distribute_tensor
        from kfac import KFAC, Preconditioner
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        mesh = dist.init_device_mesh("cpu", (1,))
        composable = fully_shard(nn.Sequential(nn.Linear(2, 2)), mesh=mesh)
        distributed = nn.Linear(2, 2)
        distributed.weight = nn.Parameter(distribute_tensor(distributed.weight.detach(), mesh))
        flat, original = (
            FullyShardedDataParallel(
                nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=use
            )
            for use in (False, True)
        )
        for model in (composable, distributed, flat, original, nn.Sequential(original)):
            for make in (KFAC, Preconditioner):
                try:
                    make(model)
                except ValueError as error:
                    print(error)
                else:
                    raise AssertionError(f"{make} takes {model}")
        dist.destroy_process_group()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 10
    assert all("DistributedDataParallel" in message for message in messages)
    assert ["DTensor" in m for m in messages] == [True] * 4 + [False] * 6


@pytest.mark.promise("parameters that are not the model's")
def test_parameters_of_another_model_are_refused() -> None:
    model = net()
    for given in (net().parameters(), copy.deepcopy(model).parameters()):
        with pytest.raises(ValueError, match=r"Pass model\.parameters\(\) of this very model"):
            KFAC(model, given, lr=0.1)
    with pytest.raises(ValueError, match=r"Pass model\.parameters\(\) of this very model"):
        Preconditioner(model, list(net().parameters()))


@pytest.mark.promise("a parameter in two groups")
def test_a_parameter_that_comes_twice_is_refused() -> None:
    model = net()
    weight = model[0].weight
    with pytest.raises(ValueError, match=r"come once, but got .*\(5, 4\).*one group"):
        KFAC(model, [{"params": [weight]}, {"params": model.parameters()}], lr=0.1)
    with pytest.raises(ValueError, match="come once"):
        KFAC(model, [weight, weight], lr=0.1)
    with pytest.raises(ValueError, match="come once"):
        Preconditioner(model, [weight, weight])
    optimizer = KFAC(model, [weight], lr=0.1)
    with pytest.raises(ValueError, match="come once"):
        optimizer.add_param_group({"params": [weight]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.promise("a weight shared by several modules")
def test_tied_and_parametrised_weights_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    parametrizations.weight_norm(model[2])
    train(model, KFAC(model, lr=0.1), steps=2)


@pytest.mark.promise("models without parameters")
@pytest.mark.filterwarnings("ignore")  # torch plans to remove these modules
def test_quantised_modules_have_nothing_to_train() -> None:
    linear = nn.Sequential(nn.Linear(2, 2))
    quantised = torch.ao.nn.quantized.Linear(2, 2)
    with pytest.raises(ValueError, match="a quantised module holds none"):
        KFAC(nn.Sequential(quantised), lr=0.1)
    model = nn.Sequential(linear, quantised)
    assert [r.treatment for r in KFAC(model, lr=0.1).summary()] == ["kfac", "kfac"]


# --- models that move -----------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "cholesky": {},
    "eigen": {"inverse": "eigen", "fisher": "type-2"},
    "ekfac": {"inverse": "ekfac"},
    "newton-schulz": {"inverse": "newton-schulz", "fisher": "empirical"},
    "inverse-free": {"inverse": "inverse-free", "fisher": "forward-only"},
    "nesterov": {"nesterov": True, "fisher": "empirical"},
    "reduce": {"weight_sharing": "reduce"},
    "grafted": {"graft": "adam"},
    "adamw": {"fallback": "adamw"},
    "sgd of torch": {"fallback": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)},
    "auto": {"lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt(period=2)},
    "rare updates": {"factor_update_period": 3, "inverse_update_period": 2},
}
CRITERION = nn.CrossEntropyLoss()


def made(model: nn.Module, settings: dict[str, Any]) -> KFAC:
    periods = {"factor_update_period": 1, "inverse_update_period": 1}
    return KFAC(model, **{"lr": 0.05, "criterion": CRITERION} | periods | settings)


def run(model: nn.Module, optimizer: KFAC, steps: int) -> None:
    first = next(model.parameters())
    x, y = X.to(first), Y.to(first.device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = CRITERION(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.promise("`model.to(dtype)` after steps")
@pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
def test_a_converted_model_goes_on_like_one_that_loads_the_state(settings: dict[str, Any]) -> None:
    model = net()
    optimizer = made(model, settings)
    run(model, optimizer, 4)
    double = net().double()
    double.load_state_dict(model.state_dict())
    fresh = made(double, settings)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.double()
    for pair in ((model, optimizer), (double, fresh)):
        run(*pair, 4)
    for mine, theirs in zip(model.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    assert optimizer.factor("0")[0].dtype == torch.float64
    for mine in optimizer.state.values():
        assert all(tensor.dtype == torch.float64 for tensor in mine.values())


@pytest.mark.promise("`model.to(dtype)` after steps")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
def test_a_model_may_become_less_precise(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = net() if dtype == torch.bfloat16 else net().double()
    optimizer = made(model, settings)
    run(model, optimizer, 3)
    model.to(dtype)
    run(model, optimizer, 3)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
    assert optimizer.factor("0")[0].dtype == torch.float32
    if "lr" not in settings:  # an automatic step may be taken back where the loss is rounded
        assert optimizer.diagnostics()["nonfinite_batches"] == 0


@pytest.mark.promise("`model.to(device)` after steps")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings",
    [s for s in MODES.values() if s.get("fisher")],
    ids=[k for k, s in MODES.items() if s.get("fisher")],
)
def test_a_moved_model_goes_on_as_if_it_had_stayed(settings: dict[str, Any]) -> None:
    models = [net().double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [made(model, settings) for model in models]
    for device in ("cpu", "cuda", "cpu"):
        models[1].to(device)
        for pair in zip(models, optimizers, strict=True):
            run(*pair, 2)
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.promise("`model.to(device)` after steps")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
def test_everything_follows_a_moved_model(settings: dict[str, Any]) -> None:
    model = net()
    optimizer = made(model, settings)
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        run(model, optimizer, 2)
        tensors = [t for mine in optimizer.state.values() for t in mine.values()]
        assert {t.device.type for t in [*tensors, *optimizer.factor("0")] if t is not None} == {
            device
        }
    assert optimizer.diagnostics()["nonfinite_batches"] == 0


@pytest.mark.promise("a part of the model moved or converted after steps")
def test_converting_a_part_of_the_model_is_refused_until_the_layers_are_updated() -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x.to(layer.weight.dtype))
            return x

    model = Mixed(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = KFAC(model, lr=0.1, fisher="empirical", factor_update_period=1)
    train(model, optimizer, 2)
    model[1].double()
    state = everything(model, optimizer)
    with pytest.raises(
        RuntimeError, match=r"layers '0', '1' are no longer.*Call update_layers\(\)"
    ):
        train(model, optimizer)
    assert_same(everything(model, optimizer), state)
    optimizer.update_layers()
    train(model, optimizer, 2)
    assert [optimizer.factor(name)[0].dtype for name in "01"] == [torch.float32, torch.float64]


# --- losses, masks and outputs --------------------------------------------------------------------

BAD_CRITERIA: list[tuple[Any, dict[str, Any], str, str]] = [
    (nn.L1Loss(), {}, r"KFAC\(criterion=", "Leave it out to train with the empirical Fisher"),
    (nn.NLLLoss(), {}, r"KFAC\(criterion=", "Leave it out to train with the empirical Fisher"),
    (nn.functional.cross_entropy, {}, r"KFAC\(criterion=", "Leave it out"),
    (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0, 1.0])),
        {},
        r"CrossEntropyLoss\(weight=",
        "no Fisher matrix",
    ),
    (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, NAN])),
        {},
        r"CrossEntropyLoss\(weight=",
        "no Fisher",
    ),
    (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([INF])),
        {},
        r"BCEWithLogitsLoss\(pos_weight=",
        "no Fisher matrix",
    ),
    (nn.MSELoss(reduction="batchmean"), {}, r"MSELoss\(reduction=", "of the loss in the training"),
    (nn.MSELoss(reduction="none"), {}, r"MSELoss\(reduction=", "loss_reduction="),
    (nn.MSELoss(), {"loss_reduction": "sum"}, r"KFAC\(loss_reduction=", "Leave it out"),
]


@pytest.mark.promise("criteria")
@pytest.mark.parametrize(("criterion", "settings", "what", "remedy"), BAD_CRITERIA)
def test_a_criterion_that_cannot_be_used_is_refused_at_construction(
    criterion: Any, settings: dict[str, Any], what: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{what}\.\.\.\) must be .*, but got .*{remedy}"):
        KFAC(net(), lr=0.1, criterion=criterion, **settings)


class Custom:
    """A squared error as a likelihood of the user's own."""

    reduction = "mean"

    def __init__(self, **methods: Any) -> None:
        vars(self).update(methods)

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        return torch.tensor(float(len(output)))

    def sample(self, output: Tensor, target: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.randn(output.shape, generator=generator)

    def num_vectors(self, output: Tensor, examples: int) -> int:
        return 1

    def vectors(self, output: Tensor, target: Tensor | None, examples: int) -> Any:
        yield torch.ones_like(output)


@pytest.mark.promise("criteria")
@pytest.mark.parametrize("reduction", ["none", "batchmean", None, 1])
def test_a_likelihood_of_ones_own_says_how_it_is_reduced(reduction: Any) -> None:
    for loss_reduction in (None, "sum"):
        criterion = Custom(reduction=reduction)
        with pytest.raises(ValueError, match=r"Custom\(reduction=\.\.\.\) must be one of 'mean'"):
            KFAC(net(), lr=0.1, criterion=criterion, loss_reduction=loss_reduction)


def image(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), model)


class Dict(nn.Module):
    """Returns its output in a dict, as the models of some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor, mask: Any = None) -> dict[str, Any]:
        return {"logits": self.inner(x), "name": "net"}


def squared(output: Any, target: Tensor) -> Tensor:
    logits = output["logits"] if isinstance(output, dict) else output
    return (logits**2).mean()


S = torch.randn(8, 5, 4, generator=_RANDOM)  # with positions
ONES = torch.ones(8, 3)
# What is wrong; the model, settings, what the loop does with the output; the error.
AT_FIRST: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Any, Tensor, str, str]] = {
    "MSELoss broadcasts": (
        lambda: nn.Sequential(nn.Linear(4, 1)),
        {"criterion": (mse := nn.MSELoss())},
        lambda output: mse(output, torch.zeros(8)),
        X,
        r"MSELoss\(target=\.\.\.\) must be of a shape that broadcasts to \(8, 1\)",
        "target.view_as",
    ),
    "MSELoss broadcasts outputs": (
        net,
        {"criterion": (mse2 := nn.MSELoss(reduction="sum"))},
        lambda output: mse2(output, torch.zeros(8, 1, 3)),
        X,
        r"MSELoss\(target=\.\.\.\) must be",
        "target.view_as",
    ),
    "BCE weight, loss as a function": (
        net,
        {"criterion": nn.BCEWithLogitsLoss(weight=torch.ones(2))},
        lambda output: squared(output, Y),
        X,
        r"BCEWithLogitsLoss\(weight=\.\.\.\) must be .* but got \(2,\)",
        "reshape",
    ),
    "pos_weight, loss as a function": (
        net,
        {"criterion": nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))},
        lambda output: squared(output, Y),
        X,
        "depends on the targets",
        r"Compute the loss as criterion\(output, target\)",
    ),
    "no such key": (
        Dict,
        {"criterion": nn.CrossEntropyLoss(), "outputs": "logit"},
        lambda output: squared(output, Y),
        X,
        r"KFAC\(outputs=\.\.\.\) must be .*but got 'logit'.*nothing out of a dict",
        r"with the keys \['logits', 'name'\]",
    ),
    "no tensor at the key": (
        Dict,
        {"criterion": nn.CrossEntropyLoss(), "outputs": "name"},
        lambda output: squared(output, Y),
        X,
        r"KFAC\(outputs=\.\.\.\) must be .* picks a str out of a dict",
        "or a function that returns it",
    ),
    "no tensor from the function": (
        Dict,
        {"criterion": nn.CrossEntropyLoss(), "outputs": lambda output: None},
        lambda output: squared(output, Y),
        X,
        r"KFAC\(outputs=\.\.\.\) must be .* picks a NoneType",
        "Pass the key",
    ),
    "mask of the wrong kind": (
        net,
        {"position_mask": lambda x: [1, 1]},
        lambda output: squared(output, Y),
        S,
        r"KFAC\(position_mask=\.\.\.\) must be .* a tensor \[N, T\], but got \[1, 1\]",
        "1 where a position is real",
    ),
    "mask of another batch": (
        net,
        {"position_mask": lambda x: torch.ones(7, 5)},
        lambda output: squared(output, Y),
        S,
        r"KFAC\(position_mask=\.\.\.\) must be \[N, T\] like the input of a layer",
        "Pass a function",
    ),
    "mask without positions": (
        net,
        {"position_mask": lambda x: torch.ones(8)},
        lambda output: squared(output, Y),
        S,
        r"KFAC\(position_mask=\.\.\.\) must be \[N, T\] like the input of a layer",
        "Pass a function",
    ),
    "mask for attention scores": (
        net,
        {"position_mask": lambda x: torch.zeros(8, 5).index_fill(1, torch.tensor([4]), -INF)},
        lambda output: squared(output, Y),
        S,
        r"KFAC\(position_mask=\.\.\.\) must be .*negative elements",
        "1 where a position is real",
    ),
    "mask of no layer": (
        net,
        {"position_mask": lambda x: torch.ones(8, 6)},
        lambda output: squared(output, Y),
        S,
        r"KFAC\(position_mask=\.\.\.\) must be \[N, T\] like the input of a layer",
        "Pass a function",
    ),
    "number of terms": (
        net,
        {"loss_terms": lambda x: 8.0},
        lambda output: squared(output, Y),
        X,
        r"KFAC\(loss_terms=\.\.\.\) must be an integer >= 1, but got 8.0",
        "returned by the function",
    ),
    "vectors of another shape": (
        net,
        {"criterion": Custom(sample=lambda output, target, generator: output[:, :1])},
        lambda output: squared(output, Y),
        X,
        r"Custom.sample\(\) must give tensors of the output's shape \(8, 3\), but gave \(8, 1\)",
        "See kfac.Likelihood",
    ),
    "no vectors": (
        net,
        {"fisher": "type-2", "criterion": Custom(vectors=lambda *_: iter([None]))},
        lambda output: squared(output, Y),
        X,
        r"Custom.vectors\(\) must give tensors .* but gave None",
        "See kfac.Likelihood",
    ),
    "many normalisers": (
        net,
        {"criterion": Custom(normalizer=lambda output, target: torch.ones(8))},
        lambda output: squared(output, Y),
        X,
        r"Custom.normalizer\(\) must give a tensor without dimensions",
        "See kfac.Likelihood",
    ),
    "too many vectors": (
        net,
        {"fisher": "type-2", "max_vectors": 2, "criterion": nn.CrossEntropyLoss()},
        lambda output: squared(output, Y),
        X,
        r"KFAC\(max_vectors=\.\.\.\) must be >= 3",
        "Raise it, or use fisher='mc'",
    ),
    "a part of the model": (
        net,
        {"fisher": "empirical"},
        None,
        X,
        "No loss terms were counted",
        "Call the model that K-FAC was given",
    ),
}


@pytest.mark.promise("shapes, masks and outputs of a batch")
@pytest.mark.filterwarnings("ignore:Using a target size")  # torch only warns
@pytest.mark.parametrize("trained", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("case", AT_FIRST)
def test_a_mistake_in_a_batch_is_reported_before_anything_changes(case: str, trained: bool) -> None:
    make, settings, loss, x, what, remedy = AT_FIRST[case]
    model = make()
    good = KFAC(model, lr=0.1, factor_update_period=1, fisher="empirical")
    for _ in range(2 * trained):
        good.zero_grad()
        squared(model(X), Y).backward()
        good.step()
    good.remove_hooks()
    optimizer = KFAC(model, **{"lr": 0.1, "factor_update_period": 1} | settings)
    state, own = good.state_dict(), optimizer.state_dict()["kfac"]
    state["kfac"] |= {key: own[key] for key in ("fisher", "seed")}
    optimizer.load_state_dict(state)
    before = everything(model, optimizer)

    def step() -> None:
        output = model(x) if loss is not None else model[2](model[0](x))
        (loss or (lambda output: squared(output, Y)))(output).backward()
        optimizer.step()

    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){what}.*{remedy}"):
            step()
        optimizer.zero_grad()
    assert_same(everything(model, optimizer), before)


@pytest.mark.promise("shapes, masks and outputs of a batch")
def test_every_batch_needs_a_mask_that_fits() -> None:
    masks = [torch.ones(8, 5), torch.ones(8, 4)]
    model = net()
    optimizer = KFAC(model, lr=0.1, position_mask=lambda x: masks[0], factor_update_period=1)
    model(S).square().mean().backward()
    optimizer.step()
    masks.pop(0)
    before = everything(model, optimizer)
    model(S).square().mean().backward()
    with pytest.raises(ValueError, match="like the input of a layer"):
        optimizer.step()
    assert_same(everything(model, optimizer), before)


@pytest.mark.promise("`nn.MSELoss`")
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("shape", [(8, 3), (1, 3), (3,), (8, 1), (1,), ()])
def test_a_target_may_be_broadcast_to_the_output(shape: tuple[int, ...]) -> None:
    model, criterion = net(), nn.MSELoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    criterion(model(X), torch.zeros(shape)).backward()
    optimizer.step()
    assert optimizer.diagnostics()["factor_updates"] == 1


@pytest.mark.promise("shapes, masks and outputs of a batch")
def test_a_call_that_fails_shows_its_own_error() -> None:
    model = Dict()
    optimizer = KFAC(model, lr=0.1, criterion=nn.CrossEntropyLoss(), outputs="logits")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.ones(2, 5))
    assert optimizer.diagnostics()["steps"] == 0


@pytest.mark.promise("names that match nothing")
@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"skip": ["iner"]}, "'inner'"),
        ({"skip": [nn.LazyLinear]}, "'Linear'"),
        ({"position_mask": "msk"}, "'mask'"),
    ],
)
def test_a_name_that_matches_nothing_comes_with_the_nearest(
    settings: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(ValueError, match=rf"must be .* but got .* Did you mean {nearest}\?"):
        KFAC(Dict(), lr=0.1, **settings)


# --- arguments ------------------------------------------------------------------------------------

WRONG_TYPES: list[Any] = [None, "nonsense", ["nonsense"], {"a": 1}, NAN, True, 1j, object()]
FINE: dict[str, list[Any]] = {
    **{key: [True] for key in ("nesterov", "maximize", "stagger_refreshes")},
    **{
        key: [None]
        for key in (
            "params", "criterion", "outputs", "fisher", "loss_reduction", "loss_terms",
            "position_mask", "refresh_tolerance", "kl_clip", "graft", "grad_scaler",
        )
    },
}  # fmt: skip
MISTAKES = [
    (owner, argument, value)
    for owner in (KFAC, Preconditioner)
    for argument in inspect.signature(owner).parameters
    for value in WRONG_TYPES
    if argument not in ("owner", "records_calls")
    and value not in FINE.get(argument, [])
    and not (owner is KFAC and argument.endswith("_period") and value is None)
]


@pytest.mark.promise("arguments")
@pytest.mark.parametrize(
    ("owner", "argument", "value"),
    MISTAKES,
    ids=[
        f"{owner.__name__}-{argument}-{type(value).__name__}" for owner, argument, value in MISTAKES
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(owner: type, argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {"model": net()} | {argument: value}
    form = rf"(?s)^{owner.__name__}\({argument}=\.\.\.\) must be .+, but got (.+?)\. (\S.*[.?])$"
    with pytest.raises(ValueError, match=form) as info:
        owner(**arguments)
    shown = value[0] if isinstance(value, list) else value
    assert repr(shown) in str(info.value)


@pytest.mark.promise("arguments")
def test_a_failed_construction_leaves_no_hooks() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    for argument in (
        {"fallback": "adam"},
        {"lr": -1.0},
        {"skip": ["none"]},
        {"position_mask": "m"},
    ):
        with pytest.raises(ValueError, match="must be"):
            KFAC(model, criterion=criterion, **argument)
    gc.collect()
    for module in [*model.modules(), criterion]:
        hooks = [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        assert hooks == []


@pytest.mark.promise("arguments")
@pytest.mark.parametrize("closure", [torch.ones(()), 1.0, "loss"])
def test_a_closure_that_is_none_is_refused(closure: Any) -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1)
    model(X).square().mean().backward()
    before = everything(model, optimizer)
    with pytest.raises(
        ValueError, match=r"KFAC.step\(closure=\.\.\.\) must be .*Call loss.backward"
    ):
        optimizer.step(closure)
    assert_same(everything(model, optimizer), before)


@pytest.mark.promise("keys of parameter groups")
@pytest.mark.parametrize(
    "group", [None, [], "params", {"lr": 0.1}, {"params": [1.0]}, {"params": []}]
)
def test_a_group_that_is_none_is_refused(group: Any) -> None:
    optimizer = KFAC(net(), lr=0.1)
    with pytest.raises(ValueError, match=r"KFAC\(params=\.\.\.\) must be .* Pass "):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.promise("arguments")
def test_parameters_may_come_in_any_form_that_torch_takes() -> None:
    model = net()
    forms: list[Callable[[], Any]] = [
        model.parameters,
        lambda: list(model.parameters()),
        lambda: tuple(model.parameters()),
        lambda: [{"params": model.parameters()}],
        lambda: iter([{"params": model[0].weight}, {"params": [model[2].weight], "lr": 0.2}]),
        model.named_parameters,
        lambda: [{"params": model.named_parameters()}],
    ]
    for form in forms:
        optimizer = KFAC(model, form(), lr=0.1)
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(isinstance(p, Tensor) for g in optimizer.param_groups for p in g["params"])
        optimizer.remove_hooks()


@pytest.mark.promise('`reduction="mean"`, `"sum"` and `"none"`')
@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_unreduced_loss_steps_like_the_loss_it_is_reduced_to(
    reduction: Any, fisher: Any
) -> None:
    model = net()
    models = [model, copy.deepcopy(model)]
    for model, declared in zip(models, (reduction, "none"), strict=True):
        criterion = nn.CrossEntropyLoss(reduction=declared)
        settings = {"loss_reduction": reduction} if declared == "none" else {}
        optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher=fisher, **settings)
        for _ in range(2):
            optimizer.zero_grad()
            loss = criterion(model(X), Y)
            (loss if declared != "none" else getattr(loss, reduction)()).backward()
            optimizer.step()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.promise("a loss computed without calling the criterion object")
@pytest.mark.parametrize(
    ("x", "ignored", "is_warned_of"), [(X, -100, False), (X, 1, True), (S, -100, True)]
)
def test_targets_that_are_not_seen_are_warned_of(
    x: Tensor, ignored: int, is_warned_of: bool
) -> None:
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, lr=0.1, criterion=nn.CrossEntropyLoss(ignore_index=ignored))
    loss = model(x).square().mean()
    if is_warned_of:
        with pytest.warns(UserWarning, match="does not see the targets"):
            loss.backward()
    else:
        loss.backward()
    optimizer.step()


MISTAKEN: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "inputs of another width": lambda model, criterion: model(torch.ones(8, 5)),
    "inputs of another dtype": lambda model, criterion: model(X.double()),
    "targets of another batch": lambda model, criterion: criterion(model(X), Y[:7]),
    "targets out of range": lambda model, criterion: criterion(model(X), Y + 3),
    "targets of another dtype": lambda model, criterion: criterion(model(X), Y.float()),
    "class weights of another length": lambda model, criterion: nn.CrossEntropyLoss(torch.ones(4))(
        model(X), Y
    ),
    "backward of many": lambda model, criterion: model(X).backward(),
    "an error of the loop": lambda model, criterion: criterion(model(X), Y) / None,
}


@pytest.mark.promise("shapes, masks and outputs of a batch")
@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("mistake", MISTAKEN)
def test_after_a_mistake_that_torch_reports_training_goes_on_as_if_it_had_not_been(
    mistake: str, fisher: Any
) -> None:
    model = net()
    models = [model, copy.deepcopy(model)]
    optimizers = []
    for model in models:
        criterion = nn.CrossEntropyLoss()
        optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher=fisher, factor_update_period=1)
        for step in range(4):
            if model is models[1] and step % 2 == 0:
                with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)):
                    MISTAKEN[mistake](model, criterion)
            optimizer.zero_grad()
            criterion(model(X), Y).backward()
            optimizer.step()
        optimizers.append(optimizer)
    assert_same(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


@pytest.mark.promise("`model.to(dtype)` after steps")
@pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
def test_layers_may_be_updated_after_the_model_was_converted(settings: dict[str, Any]) -> None:
    models = [net(), net()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [made(model, settings) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        run(model, optimizer, 3)
        model.double()
        if model is models[1]:
            optimizer.update_layers()
        run(model, optimizer, 3)
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


class Grown(nn.Module):
    """A model to which a layer and a slope are added, in use at once."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.slope, self.added = nn.Linear(4, 3), nn.PReLU(), nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return self.added(self.slope(self.body(x)))


@pytest.mark.promise("`add_param_group` after construction")
@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, KeyboardInterrupt])
def test_a_group_whose_fallback_fails_leaves_everything_as_it_was(kind: type) -> None:
    faults = []

    def make(groups: Any) -> torch.optim.Optimizer:
        if faults:
            raise faults[0]
        return torch.optim.Adam(groups, lr=0.01)

    models, optimizers = [Grown(), Grown()], []
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = KFAC(model, damping=lambda step: 0.1 + step, fallback=make, fisher="empirical")
        train(model, optimizer, 2)
        if model is models[1]:
            model.added.append(nn.Linear(3, 3)).append(nn.PReLU())
            before = everything(model, optimizer)
            parameters, rows = list(model.added.parameters()), str(optimizer.summary())
            faults.append(kind("of the user's"))
            with pytest.raises(kind, match="of the user's"):
                optimizer.add_param_group({"params": parameters, "lr": 0.1})
            faults.clear()
            assert_same(everything(model, optimizer), before)
            assert str(optimizer.summary()) == rows
            model.added = nn.Sequential()
        train(model, optimizer, 2)
        optimizers.append(optimizer)
    assert_same(everything(models[0], optimizers[0]), everything(models[1], optimizers[1]))


@pytest.mark.promise("parameters unfrozen after construction")
def test_layers_are_not_updated_where_the_fallback_fails() -> None:
    model, faults = net(), []
    model[2].requires_grad_(False)

    def make(groups: Any) -> torch.optim.Optimizer:
        if faults:
            raise TypeError("of the user's")
        return torch.optim.Adam(groups, lr=0.01)

    optimizer = KFAC(model, fallback=make, fisher="empirical")
    train(model, optimizer, 2)
    before, rows = everything(model, optimizer), str(optimizer.summary())
    model[0].requires_grad_(False)
    faults.append(True)
    with pytest.raises(TypeError, match="of the user's"):
        optimizer.update_layers()
    model[0].requires_grad_(True)
    assert_same(everything(model, optimizer), before)
    assert str(optimizer.summary()) == rows
    train(model, optimizer, 2)
