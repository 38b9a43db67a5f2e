"""`torch.compile`: a compiled model trains like the plain one, wherever it was compiled."""

import copy
import gc
import importlib.util
import inspect
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from kfac import KFAC, capture

SIZES = (32, 32, 7, 32)  # of the batches of a run
PERIOD = 3  # factors and inverses change in every third step
# torch >= 2.7 shows why a graph cannot be whole
KNOWS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters
# torch 2.14 warns where a compiled part, or what follows a gap, is given what was computed before;
# with or without K-FAC.
takes_results = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    logging.getLogger("torch.__trace").propagate = False  # pytest would format every event
    yield
    torch._dynamo.reset()
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Block(nn.Module):
    """A part that may be compiled on its own; torch 2.6 does not compile containers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    """Layers of two kinds, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.body = Block()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.body(self.norm(self.first(x)))))


class Broken(Net):
    """A graph break of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        torch._dynamo.graph_break()
        return self.last(self.body(x))


class Checkpointed(Net):
    """A region that is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, self.norm(self.first(x)), use_reentrant=False)
        return self.last(x)


class Stack(nn.Sequential):
    """One of torch's own containers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Compiler:
    """A backend that runs graphs as they are, and counts.

    Attributes:
        graphs: Compiled so far.
        runs: Of compiled graphs, while gradients were recorded.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*inputs: Any) -> Any:
            self.runs += torch.is_grad_enabled()
            return graph(*inputs)

        return run


Make = Callable[[nn.Module], KFAC]


def compiled_before(model: nn.Module, make: Make, **options: Any) -> tuple[nn.Module, KFAC]:
    compiled = torch.compile(model, **options)
    return compiled, make(compiled)


def compiled_after(model: nn.Module, make: Make, **options: Any) -> tuple[nn.Module, KFAC]:
    optimizer = make(model)
    return torch.compile(model, **options), optimizer


def compiled_in_place_before(
    model: nn.Module, make: Make, **options: Any
) -> tuple[nn.Module, KFAC]:
    model.compile(**options)
    return model, make(model)


def compiled_in_place_after(model: nn.Module, make: Make, **options: Any) -> tuple[nn.Module, KFAC]:
    optimizer = make(model)
    model.compile(**options)
    return model, optimizer


def part_compiled_before(model: nn.Module, make: Make, **options: Any) -> tuple[nn.Module, KFAC]:
    model.body = torch.compile(model.body, **options)
    return model, make(model)


def part_compiled_after(model: nn.Module, make: Make, **options: Any) -> tuple[nn.Module, KFAC]:
    optimizer = make(model)
    model.body.compile(**options)
    return model, optimizer


WAYS = [
    compiled_before,
    compiled_after,
    compiled_in_place_before,
    compiled_in_place_after,
    part_compiled_before,
    part_compiled_after,
]
OTHERS = ["empirical", "automatic"]


def maker(mode: str, criterion: nn.Module) -> Make:
    """Constructs the optimizer that a mode stands for."""
    settings: dict[str, Any] = {"fisher": mode, "lr": 0.1}
    if mode == "automatic":
        settings = {"lr": "auto", "momentum": "auto"}
    periods = {"factor_update_period": PERIOD, "inverse_update_period": PERIOD}
    return lambda model: KFAC(model, criterion=criterion, **settings, **periods)


def train(
    model: nn.Module, optimizer: KFAC, criterion: nn.Module, sizes: tuple[int, ...] = SIZES
) -> list[float]:
    """A step for each batch, with an evaluation after each; returns the losses."""
    draw = torch.Generator().manual_seed(0)
    losses = []
    for size in sizes:
        x = torch.randn(size, 4, generator=draw)
        y = torch.randint(3, (size,), generator=draw)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(x), y)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
        model.eval()
        with torch.no_grad():
            losses.append(float(criterion(model(x), y)))
        model.train()
    return losses


def trained(
    way: Callable[..., tuple[nn.Module, KFAC]],
    mode: str,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[tuple[KFAC, list[float]], tuple[KFAC, list[float]]]:
    """The optimizer and the losses of a run of the plain model, and of the compiled one."""
    criterion = nn.CrossEntropyLoss()
    plain = Net() if model is None else model
    other, optimizer = way(copy.deepcopy(plain), maker(mode, criterion), **options)
    reference = maker(mode, criterion)(plain)
    return (
        (reference, train(plain, reference, criterion)),
        (optimizer, train(other, optimizer, criterion)),
    )


def state_of(optimizer: KFAC) -> list[Tensor]:
    """Parameters, factors and momentum."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    layers = optimizer.state_dict()["kfac"]["layers"].values()
    factors = [factor for layer in layers for factor in layer["factors"].values()]
    return [*parameters, *factors, *(b for p in parameters for b in optimizer.state[p].values())]


def assert_same(
    runs: tuple[tuple[KFAC, list[float]], tuple[KFAC, list[float]]], **tolerances: float
) -> None:
    (reference, expected), (optimizer, losses) = runs
    mine, theirs = state_of(optimizer), state_of(reference)
    assert len(mine) == len(theirs) > 8
    if not tolerances:
        assert losses == expected
        assert all(map(torch.equal, mine, theirs))
    torch.testing.assert_close(losses, expected, **tolerances)
    torch.testing.assert_close(mine, theirs, **tolerances)


@pytest.mark.promise("compiled before K-FAC is constructed: `KFAC(torch.compile(model))`")
@pytest.mark.promise("compiled afterwards, or in place (`model.compile()`)")
@pytest.mark.promise("only a part of the model compiled")
@pytest.mark.promise("batches of different sizes; `dynamic=True`")
@takes_results
@pytest.mark.parametrize(
    ("way", "mode"),
    [*((way, "mc") for way in WAYS), *((compiled_before, mode) for mode in OTHERS)],
)
def test_a_compiled_model_trains_like_the_plain_one_to_the_bit(way: Any, mode: str) -> None:
    compiler = Compiler()
    assert_same(trained(way, mode, backend=compiler))
    assert compiler.runs


@pytest.mark.promise("compiled afterwards, or in place (`model.compile()`)")
def test_a_fisher_pass_never_meets_a_compiled_backward_pass() -> None:
    assert_same(trained(compiled_in_place_after, "mc", backend="aot_eager"), rtol=1e-5, atol=1e-6)


@pytest.mark.promise("Inductor")
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # of torch 2.6's caches
def test_inductor_trains_like_the_plain_model() -> None:
    assert_same(trained(compiled_before, "mc"), rtol=1e-4, atol=1e-5)


@pytest.mark.promise("batches of different sizes; `dynamic=True`")
def test_sizes_may_be_dynamic() -> None:
    compiler = Compiler()
    assert_same(trained(compiled_before, "mc", backend=compiler, dynamic=True))
    assert compiler.runs


@takes_results
@pytest.mark.promise("a graph break in the model")
def test_a_graph_break_in_the_model_changes_nothing() -> None:
    assert_same(trained(compiled_before, "mc", Broken(), backend=Compiler()))


@pytest.mark.promise("only a part of the model compiled")
@takes_results
def test_a_compiled_part_may_be_checkpointed() -> None:
    runs = trained(part_compiled_before, "mc", Checkpointed(), backend="aot_eager")
    assert_same(runs, rtol=1e-5, atol=1e-6)


# --- whole graphs ------------------------------------------------------------------------------


@pytest.mark.promise("`fullgraph=True`")
@pytest.mark.parametrize(("mode", "kind"), [("mc", Net), ("automatic", Stack)])
def test_a_model_may_be_one_graph(mode: str, kind: type[nn.Module]) -> None:
    compiler = Compiler()
    assert_same(trained(compiled_before, mode, kind(), backend=compiler, fullgraph=True))
    assert compiler.runs
    assert not counters["graph_break"]


@pytest.mark.promise("`fullgraph=True`")
@pytest.mark.parametrize("way", [compiled_after, compiled_in_place_after, compiled_in_place_before])
def test_hooks_within_a_whole_graph_are_refused(way: Any) -> None:
    criterion = nn.CrossEntropyLoss()
    model, optimizer = way(Net(), maker("mc", criterion), backend="eager", fullgraph=True)
    before = [t.clone() for t in state_of(optimizer)]
    with pytest.raises(RuntimeError, match=r"KFAC\(torch.compile\(model, fullgraph=True\)\)"):
        train(model, optimizer, criterion)
    assert all(map(torch.equal, state_of(optimizer), before))
    optimizer.remove_hooks()
    assert model(torch.ones(5, 4)).shape == (5, 3)


@pytest.mark.promise("`fullgraph=True`")
def test_hooks_within_the_whole_graph_of_a_container_are_refused() -> None:
    """torch traces hooks of its own containers; then the error is torch's, with our reason."""
    criterion, model = nn.CrossEntropyLoss(), nn.Sequential(nn.Linear(4, 3))
    way, make = compiled_after, maker("mc", criterion)
    compiled, optimizer = way(model, make, backend="eager", fullgraph=True)
    reason = "Compile the model before K-FAC sees it" if KNOWS_REASON else "disable"
    with pytest.raises(RuntimeError, match=reason):
        train(compiled, optimizer, criterion)
    optimizer.remove_hooks()
    assert compiled(torch.ones(5, 4)).shape == (5, 3)


@pytest.mark.promise("`fullgraph=True`")
def test_the_hooks_of_a_lost_optimizer_leave_no_gaps() -> None:
    compiler = Compiler()
    model = torch.compile(Net(), backend=compiler, fullgraph=True)
    optimizer = maker("mc", nn.CrossEntropyLoss())(model)
    del optimizer
    gc.collect()
    model(torch.ones(5, 4)).sum().backward()
    assert compiler.runs == 1


@pytest.mark.promise("`fullgraph=True`")
def test_a_copy_of_the_model_may_be_one_graph() -> None:
    model, compiler = Net(), Compiler()
    optimizer = maker("mc", nn.CrossEntropyLoss())(model)
    copied = torch.compile(copy.deepcopy(model), backend=compiler, fullgraph=True)
    copied(torch.ones(5, 4)).sum().backward()
    assert compiler.runs == 1
    assert optimizer.state_dict()["kfac"]["counters"]


# --- what is compiled, and how often -----------------------------------------------------------


@pytest.mark.promise("steps that update the factors")
@pytest.mark.parametrize("way", [compiled_before, compiled_in_place_after])
def test_only_steps_that_update_factors_run_without_compiled_code(way: Any) -> None:
    compiler, criterion = Compiler(), nn.CrossEntropyLoss()
    model, optimizer = way(Net(), maker("mc", criterion), backend=compiler)
    ran = []
    for _ in range(8):
        before = compiler.runs
        train(model, optimizer, criterion, (32,))
        ran.append(compiler.runs - before)
    assert ran == [0, 1, 1, 0, 1, 1, 0, 1]


@pytest.mark.promise("recompilations")
def test_a_long_run_compiles_no_more_than_without_kfac() -> None:
    epoch = (32, 32, 7)
    criterion, plain, mine = nn.CrossEntropyLoss(), Compiler(), Compiler()
    reference = torch.compile(Net(), backend=plain)
    sgd: Any = torch.optim.SGD(reference.parameters(), 0.01)
    train(reference, sgd, criterion, 2 * epoch)
    torch._dynamo.reset()
    model, optimizer = compiled_in_place_after(Net(), maker("mc", criterion), backend=mine)
    train(model, optimizer, criterion, 2 * epoch)
    settled = mine.graphs
    train(model, optimizer, criterion, 4 * epoch)
    assert mine.graphs == settled <= plain.graphs


# --- the rest of the loop ----------------------------------------------------------------------


@pytest.mark.promise("`optimizer.step` and `optimizer.zero_grad` in compiled code")
@takes_results
def test_a_compiled_optimizer_step_is_the_plain_one() -> None:
    def way(model: nn.Module, make: Make, **options: Any) -> tuple[nn.Module, KFAC]:
        optimizer = make(model)
        optimizer.step = torch.compile(optimizer.step, **options)  # type: ignore[method-assign]
        return model, optimizer

    assert_same(trained(way, "mc", backend=Compiler()))


@pytest.mark.promise("`optimizer.step` and `optimizer.zero_grad` in compiled code")
def test_an_optimizer_step_within_a_whole_graph_is_refused() -> None:
    model = Net()
    optimizer = maker("mc", nn.CrossEntropyLoss())(model)
    before = [t.clone() for t in state_of(optimizer)]
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    reason = (
        "call optimizer.zero_grad\\(\\) and optimizer.step\\(\\)" if KNOWS_REASON else "skipped"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        step()
    assert all(map(torch.equal, state_of(optimizer), before))


@takes_results
@pytest.mark.promise("`loss.backward()` in compiled code")
def test_a_compiled_training_step_is_the_plain_one() -> None:
    criterion, plain = nn.CrossEntropyLoss(), Net()
    other = copy.deepcopy(plain)
    optimizers = [maker("mc", criterion)(model) for model in (plain, other)]

    def step(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(step, backend="aot_eager")
    for size in (32, 32):
        x, y = torch.randn(size, 4), torch.randint(3, (size,))
        expected = step(plain, optimizers[0], x, y)
        torch.testing.assert_close(compiled(other, optimizers[1], x, y), expected)
    torch.testing.assert_close(state_of(optimizers[1]), state_of(optimizers[0]))


@pytest.mark.promise("`loss.backward()` in compiled code")
def test_a_training_step_as_one_graph_is_refused() -> None:
    model, criterion = Net(), nn.CrossEntropyLoss()
    optimizer = maker("mc", criterion)(model)
    before = [t.clone() for t in state_of(optimizer)]

    def step(x: Tensor, y: Tensor) -> None:
        criterion(model(x), y).backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="Compile the model before" if KNOWS_REASON else "disab"):
        compiled(torch.ones(5, 4), torch.zeros(5, dtype=torch.long))
    assert all(map(torch.equal, state_of(optimizer), before))


@pytest.mark.promise("a compiled criterion")
def test_a_compiled_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"KFAC\(criterion=...\) must be one of"):
        KFAC(Net(), criterion=torch.compile(nn.CrossEntropyLoss(), backend="eager"))


@takes_results
@pytest.mark.promise("a compiled criterion")
def test_the_loss_may_be_computed_by_a_compiled_criterion() -> None:
    criterion, plain = nn.CrossEntropyLoss(), Net()
    other = copy.deepcopy(plain)
    reference, optimizer = (maker("mc", criterion)(model) for model in (plain, other))
    compiled = torch.compile(copy.copy(criterion), backend="eager")
    optimizer = maker("mc", compiled._orig_mod)(other)
    expected = train(plain, reference, criterion, (32, 32))
    assert train(other, optimizer, compiled, (32, 32)) == expected


# --- what is left behind -----------------------------------------------------------------------


class Failing(nn.Module):
    """Raises on a batch of one example; looks as if it used the weight of its layer by itself."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise self.error
        return F.linear(x, self.linear.weight, self.linear.bias)


FORGET: list[Callable[[nn.Module, KFAC], object]] = [
    lambda model, optimizer: optimizer.zero_grad(),
    lambda model, optimizer: optimizer.remove_hooks(),
    lambda model, optimizer: model(torch.ones(5, 4)),
]


@pytest.mark.promise("a forward pass that raises")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("forget", FORGET, ids=["zero_grad", "remove_hooks", "forward"])
def test_a_failed_forward_pass_leaves_nothing_entered(
    forget: Callable[[nn.Module, KFAC], object], error: type[BaseException]
) -> None:
    model, criterion, compiler = Failing(error), nn.CrossEntropyLoss(), Compiler()
    optimizer = maker("mc", criterion)(model)
    with pytest.raises(error):
        model(torch.ones(1, 4))
    with _Entered() as entered:  # a mode of the user's, on top of what may have been left
        forget(model, optimizer)
        assert _get_current_function_mode_stack() == [entered]
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch.compile(Stack(), backend=compiler)(torch.ones(5, 4))
    assert compiler.runs == 1


@pytest.mark.promise("a forward pass that raises")
def test_training_goes_on_after_an_interrupted_forward_pass() -> None:
    criterion, plain = nn.CrossEntropyLoss(), Failing(KeyboardInterrupt)
    other = copy.deepcopy(plain)
    reference, optimizer = (maker("mc", criterion)(model) for model in (plain, other))
    with pytest.raises(KeyboardInterrupt):
        other(torch.ones(1, 4))
    assert train(other, optimizer, criterion) == train(plain, reference, criterion)
    assert all(map(torch.equal, state_of(optimizer), state_of(reference)))


class _Entered(TorchFunctionMode):
    """A mode that does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.promise("several K-FAC optimizers on one model")
@pytest.mark.parametrize("kind", [Net, Stack])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_each_of_two_optimizers_measures_as_if_it_were_alone(
    kind: type[nn.Module], compiled: bool
) -> None:
    criterion, model, fishers = nn.CrossEntropyLoss(), kind(), ("empirical", "type-2")
    x, y = torch.randn(32, 4), torch.randint(3, (32,))

    def factors(model: nn.Module, *fishers: Any) -> list[Tensor]:
        called = torch.compile(model, backend="eager") if compiled else model
        optimizers = [KFAC(called, criterion=criterion, lr=0.1, fisher=f) for f in fishers]
        criterion(called(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        layers = [o.state_dict()["kfac"]["layers"].values() for o in optimizers]
        return [f for optimizer in layers for layer in optimizer for f in layer["factors"].values()]

    alone = [f for fisher in fishers for f in factors(copy.deepcopy(model), fisher)]
    together = factors(model, *fishers)
    assert len(together) == len(alone) >= 8
    assert all(map(torch.equal, together, alone))


@takes_results
@pytest.mark.promise("a later torch")
def test_without_a_way_to_leave_compiled_code_graphs_have_gaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = importlib.util.find_spec("kfac.compilation")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch._C._dynamo.eval_frame", None)
        spec.loader.exec_module(module)
    monkeypatch.setattr(capture, "EagerForward", module.EagerForward)
    assert_same(trained(compiled_in_place_after, "mc", backend="eager"))


@pytest.mark.promise("`import kfac`")
def test_the_package_does_not_import_the_compiler() -> None:
    program = "import sys, kfac; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.promise("steps that update the factors")
def test_a_stance_of_the_user_is_kept() -> None:
    criterion = nn.CrossEntropyLoss()
    model, optimizer = compiled_before(Net(), maker("mc", criterion), backend="eager")
    with torch.compiler.set_stance("eager_on_recompile"):
        train(model, optimizer, criterion, (32,))
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"
