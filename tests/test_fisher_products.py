"""Products with the Fisher matrix equal those with the dense one, and leave nothing changed."""

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutants import replace
from oracles import jacobian, loss_hessian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac.fisher_products
import kfac.recorder
from kfac import KFAC
from kfac.fisher import Bernoulli, CrossEntropy, Gaussian, likelihood_of
from kfac.fisher_products import FisherProducts
from kfac.names import unwrapped
from kfac.recorder import RecordedCall, Recorder, View

EXACT = {"rtol": 1e-8, "atol": 1e-10}


class Watched:
    """A model whose calls are recorded, as an optimizer would."""

    def __init__(self, model: nn.Module, select: Callable[[Any], Tensor] | None = None) -> None:
        self.model = model
        self.recorder = Recorder(unwrapped(model), select)
        self.latest: RecordedCall | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.latest = self.recorder.begin(args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self.latest is not None
        self.recorder.end(self.latest, output)
        self.latest = None if module is not self.model else self.latest

    def add_loss(self, output: Tensor, target: Tensor | None, **settings: Any) -> None:
        assert self.latest is not None
        self.recorder.add_loss([self.latest], output, target, **settings)


class Net(nn.Module):
    """Convolution, BatchNorm, dropout and a tied weight; classes are the second axis."""

    def __init__(self, positions: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.4)
        self.mix = nn.Linear(4, 4, bias=False)
        self.head = (
            nn.Conv1d(4, 3, 1) if positions else nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.norm(self.conv(x)), inplace=True))
        for _ in range(2):
            x = torch.tanh(self.mix(x.mT)).mT
        return self.head(x)


def batch(size: int = 4) -> Tensor:
    return torch.randn(size, 2, 5, dtype=torch.float64)


def directions(model: nn.Module, count: int = 2) -> list[dict[nn.Parameter, Tensor]]:
    return [{p: torch.randn_like(p) for p in model.parameters()} for _ in range(count)]


def matrix(vectors: Sequence[dict[nn.Parameter, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([d.flatten() for d in each.values()]) for each in vectors])


def dense(model: nn.Module, state: Tensor, inputs: Tensor, criterion: Any, target: Any) -> Tensor:
    """The GGN of one batch, with the random numbers that the model saw."""
    torch.set_rng_state(state)
    twin = copy.deepcopy(model)
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    torch.set_rng_state(state)
    j = jacobian(twin, inputs)
    torch.set_rng_state(state)
    hessian = loss_hessian(twin(inputs), target, lambda o, y: criterion(o, y))
    return j.T @ hessian @ j


W3 = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1, 2])
AT_POSITIONS = torch.arange(20).view(4, 5) % 3
HALVES = torch.linspace(0, 1, 12, dtype=torch.float64).view(4, 3)

# name: criterion by reduction, target
CASES: dict[str, tuple[Callable[..., nn.Module], Tensor]] = {
    "cross-entropy": (nn.CrossEntropyLoss, CLASSES),
    "class weights": (lambda **k: nn.CrossEntropyLoss(weight=W3, **k), CLASSES),
    "ignore_index": (lambda **k: nn.CrossEntropyLoss(ignore_index=2, **k), CLASSES),
    "label smoothing": (
        lambda **k: nn.CrossEntropyLoss(weight=W3, label_smoothing=0.2, ignore_index=1, **k),
        CLASSES,
    ),
    "soft targets": (
        lambda **k: nn.CrossEntropyLoss(weight=W3, label_smoothing=0.1, **k),
        HALVES.softmax(1),
    ),
    "positions": (lambda **k: nn.CrossEntropyLoss(weight=W3, ignore_index=1, **k), AT_POSITIONS),
    "binary": (nn.BCEWithLogitsLoss, HALVES),
    "pos_weight": (lambda **k: nn.BCEWithLogitsLoss(pos_weight=W3, **k), HALVES),
    "weight": (lambda **k: nn.BCEWithLogitsLoss(weight=W3, pos_weight=W3, **k), HALVES),
    "squared error": (nn.MSELoss, HALVES),
}


def check_products(
    case: str,
    reduction: str = "mean",
    wrap: Callable[[Any], Any] = lambda likelihood: likelihood,
) -> FisherProducts:
    """Two micro-batches of different sizes, against the dense matrix of their summed losses."""
    torch.manual_seed(1)
    make, target = CASES[case]
    criterion, summed = make(reduction=reduction), make(reduction="sum")
    model = Net(positions=case == "positions").double()
    watched = Watched(model)
    likelihood = likelihood_of(criterion, None, "KFAC")
    normalizer, expected = torch.zeros(()).double(), 0.0
    for rows in (slice(0, 4), slice(1, 3)):
        x, y = batch()[rows], target[rows]
        state = torch.get_rng_state()
        output = model(x)
        watched.add_loss(output, y, examples=len(x))
        value, total = criterion(output, y), summed(output, y)
        # torch's own normaliser, not ours
        normalizer += total.detach() / make(reduction="mean")(output, y).detach()
        value.backward()
        expected = expected + dense(model, state, x, summed, y)
    d = directions(model)
    products = FisherProducts(model, wrap(likelihood))
    found = products(watched.recorder.calls, d, normalizer)
    torch.testing.assert_close(found, matrix(d) @ (expected / normalizer) @ matrix(d).T, **EXACT)
    return products


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_dense_matrix(case: str, reduction: str) -> None:
    assert check_products(case, reduction).jacobian.mode == "forward"


def check_a_part(case: str, fraction: float = 0.5) -> None:
    """The estimate from the first half of a batch is the whole of a batch with that half."""
    torch.manual_seed(1)
    make, target = CASES[case]
    model = Net(positions=case == "positions").double().eval()
    likelihood = likelihood_of(make(reduction="sum"), None, "KFAC")
    d, x, found = directions(model), batch(), []
    for rows in (4, 2):
        watched = Watched(model)
        products = FisherProducts(model, likelihood)
        watched.add_loss(model(x[:rows]), target[:rows], examples=rows)
        calls = watched.recorder.calls
        whole = products(calls, d, 1.0)  # the first products are of all examples, and checked
        found.append(products(calls, d, 1.0, fraction) if rows == 4 else whole)
        watched.remove()
    torch.testing.assert_close(found[0], found[1] * 2, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_is_made_of_the_first_examples(case: str) -> None:
    check_a_part(case)


def test_a_mutant_that_forgets_how_many_there_are_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace(
        RecordedCall, "part", lambda original, self, fraction: (original(self, fraction)[0], 1.0)
    )(monkeypatch)
    with pytest.raises(AssertionError):
        check_a_part("cross-entropy")


def test_where_the_examples_are_not_known_all_are_used() -> None:
    class Recurrent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mT.reshape(-1, 3)  # examples are the second axis

    model = nn.Sequential(nn.Linear(3, 3), Recurrent()).double()
    watched = Watched(model)
    watched.add_loss(model(torch.randn(5, 3).double()), torch.randn(5, 3).double(), examples=4)
    (call,) = watched.recorder.calls
    part, share = call.part(0.5)
    assert part is call
    assert share == 1


@pytest.mark.parametrize("case", CASES)
def test_the_normalizer_is_that_of_the_criterion(case: str) -> None:
    make, target = CASES[case]
    shape = (4, 3, 5) if case == "positions" else (4, 3)
    output = torch.randn(shape, dtype=torch.float64)
    found = likelihood_of(make(), None, "KFAC").normalizer(output, target)
    expected = make(reduction="sum")(output, target) / make()(output, target)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0)


def example_output(case: str) -> Tensor:
    torch.manual_seed(1)
    shape = (4, 3, 5) if case == "positions" else (4, 3)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
def test_the_vectors_of_a_likelihood_make_the_hessian_of_every_example(case: str) -> None:
    make, target = CASES[case]
    output = example_output(case)
    likelihood = likelihood_of(make(), None, "KFAC")
    vectors = torch.stack(list(likelihood.vectors(output, target, 4))).flatten(2)
    assert len(vectors) == likelihood.num_vectors(output, 4) == output[0].numel()
    hessian = loss_hessian(output, target, make(reduction="sum")).view(4, len(vectors), 4, -1)
    for n in range(4):
        torch.testing.assert_close(vectors[:, n].T @ vectors[:, n], hessian[n, :, n], **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_what_a_likelihood_gives_holds_no_graph(case: str) -> None:
    make, target = CASES[case]
    output = example_output(case)
    likelihood: Any = likelihood_of(make(), None, "KFAC")
    found = [
        likelihood.normalizer(output, target),
        likelihood.sample(output, target, torch.Generator()),
        likelihood.hessian_products(output, target, [torch.ones_like(output)]),
        *likelihood.vectors(output, target, 4),
    ]
    assert not any(tensor.requires_grad for tensor in found)


def test_a_single_class_may_have_a_weight_and_ignored_targets() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([3.0]))
    target = torch.tensor([0, -100, 0])
    found = likelihood_of(criterion, None, "KFAC").normalizer(torch.randn(3, 1), target)
    assert found.item() == 6.0


def test_type_2_needs_as_many_terms_for_every_example() -> None:
    likelihood = likelihood_of(nn.MSELoss(), None, "KFAC")
    with pytest.raises(ValueError, match=r"10 loss terms are not a multiple of the batch size 4"):
        likelihood.num_vectors(torch.zeros(5, 2), 4)


def test_class_weights_need_the_targets() -> None:
    likelihood = likelihood_of(nn.CrossEntropyLoss(weight=torch.ones(3)), None, "KFAC")
    with pytest.raises(ValueError, match="class weights depends on the targets"):
        likelihood.sample(torch.zeros(4, 3), None, torch.Generator())
    with pytest.raises(ValueError, match="class weights depends on the targets"):
        likelihood.normalizer(torch.zeros(4, 3), None)
    plain = likelihood_of(nn.CrossEntropyLoss(), None, "KFAC")
    assert plain.normalizer(torch.zeros(4, 3), None).item() == 4


class Foreign:
    """A likelihood of the user's own: the protocol, and nothing else."""

    reduction = "mean"

    def __init__(self, likelihood: Any) -> None:
        self.normalizer = likelihood.normalizer
        self.sample = likelihood.sample
        self.num_vectors = likelihood.num_vectors
        self.vectors = likelihood.vectors


@pytest.mark.parametrize("case", ["label smoothing", "positions", "pos_weight"])
def test_a_likelihood_of_the_users_own_needs_nothing_beyond_the_protocol(case: str) -> None:
    check_products(case, wrap=Foreign)


class ByHand(Foreign):
    def hessian_products(self, output: Tensor, target: Any, tangents: Sequence[Tensor]) -> Tensor:
        z = torch.stack(list(tangents)).flatten(1)
        return 2 * z @ z.T

    def vectors(self, *_: Any) -> Iterator[Tensor]:  # type: ignore[override]
        raise AssertionError

    def __init__(self, likelihood: Any) -> None:
        self.reduction = "mean"


def test_a_likelihood_of_the_users_own_is_taken_as_it_is() -> None:
    own = Foreign(likelihood_of(nn.MSELoss(), None, "KFAC"))
    assert likelihood_of(own, None, "KFAC") is own


def test_a_likelihood_of_the_users_own_may_bring_its_products() -> None:
    check_products("squared error", wrap=ByHand)


def everything(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [
        torch.get_rng_state(),
        *gradients,
        *(b.clone() for b in model.buffers()),
        *(p.detach().clone() for p in model.parameters()),
    ]


def check_untouched(double_backward: bool = False) -> None:
    """Products in the middle of a run change nothing of it, bit for bit."""
    results = []
    for with_products in (False, True):
        torch.manual_seed(2)
        criterion = nn.CrossEntropyLoss()
        model = Net().double()
        optimizer = KFAC(model, lr=0.1, criterion=criterion, factor_update_period=1)
        watched = Watched(model)
        calls = []
        model.conv.weight.register_hook(lambda g, calls=calls: calls.append(g))
        products = FisherProducts(model, likelihood_of(criterion, None, "KFAC"))
        if double_backward:
            products.jacobian.mode = "double-backward"
        for _ in range(3):
            x = batch()
            optimizer.zero_grad()
            output = model(x)
            watched.add_loss(output, CLASSES)
            criterion(output, CLASSES).backward()
            before, seen = everything(model), optimizer._engine.capture._record
            if with_products:
                d = [{p: torch.cos(p.detach()) for p in model.parameters()}]
                products(watched.recorder.calls, d, 4.0)
            for a, b in zip(before, everything(model), strict=True):
                assert torch.equal(a, b)
            assert optimizer._engine.capture._record is seen
            watched.recorder.clear()
            optimizer.step()
        assert len(calls) == 3
        results.append([*everything(model), *itertools.chain(*map(optimizer.factor, ["conv"]))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("double_backward", [False, True])
def test_products_leave_gradients_buffers_random_numbers_and_hooks_alone(
    double_backward: bool,
) -> None:
    check_untouched(double_backward)


# Forward mode and double backward


class Sine(torch.autograd.Function):
    """Twice differentiable, but without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos()


class OnceSine(Sine):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Last(nn.Module):
    """The last state of a recurrent net, which has no forward mode in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0][:, -1])


class Weighed(nn.Module):
    """A weight divided by its own norm, which is taken for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.inner.weight.norm()
        return F.linear(x, self.inner.weight / norm, self.inner.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


def linear(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 3))


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3))


def sequence(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "plain": (lambda: linear(nn.GELU()), sequence(4, 3), "forward"),
    "custom function": (lambda: linear(Apply(Sine.apply)), sequence(4, 3), "double-backward"),
    "weight norm": (normed, sequence(4, 3), "double-backward"),
    "fused attention": (Attention, sequence(4, 5, 4), "forward"),
    "no_grad inside": (Weighed, sequence(4, 3), "double-backward"),
    "checkpointing": (Checkpointed, sequence(4, 3), "forward"),
    "GroupNorm": (lambda: linear(nn.GroupNorm(2, 4)), sequence(4, 3), "forward"),
}


def check_model(name: str) -> FisherProducts:
    torch.manual_seed(3)
    make, inputs, mode = MODELS[name]
    model, criterion = make().double(), nn.CrossEntropyLoss()
    watched = Watched(model)
    x, state = inputs(), torch.get_rng_state()
    watched.add_loss(model(x), CLASSES)
    after = torch.get_rng_state()
    expected = dense(model, state, x, criterion, CLASSES)
    torch.set_rng_state(after)
    products = FisherProducts(model, likelihood_of(criterion, None, "KFAC"))
    d = directions(model)
    for _ in range(2):  # the second time by the mode that was found
        found = products(watched.recorder.calls, d, 4.0)
        torch.testing.assert_close(found, matrix(d) @ expected @ matrix(d).T, **EXACT)
        assert products.jacobian.mode == mode
    assert (products.jacobian.reason == "") == (mode == "forward")
    return products


@pytest.mark.parametrize("name", MODELS)
def test_the_mode_is_chosen_by_what_the_model_allows(name: str) -> None:
    check_model(name)


def test_what_was_wrong_with_forward_mode_is_told() -> None:
    assert "forward AD with _weight_norm" in check_model("weight norm").jacobian.reason
    assert "jvp function" in check_model("custom function").jacobian.reason
    assert "does not agree" in check_model("no_grad inside").jacobian.reason


def test_a_recurrent_net_is_differentiated_twice() -> None:
    model = Last()
    watched = Watched(model)
    x = torch.randn(4, 5, 3)
    watched.add_loss(model(x), HALVES)
    j = jacobian(model, x).double()
    d = directions(model)
    products = FisherProducts(model, Gaussian(nn.MSELoss(), None))
    found = products(watched.recorder.calls, d, 6.0)
    along = matrix(d).double() @ j.T
    torch.testing.assert_close(found, along @ along.T / 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["once differentiable", "EmbeddingBag"])
def test_a_model_without_any_second_derivative_is_refused(name: str) -> None:
    model, x = linear(Apply(OnceSine.apply)).double(), torch.randn(4, 3).double()
    if name == "EmbeddingBag":
        model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)).double()
        x = torch.arange(12).view(4, 3) % 7
    watched = Watched(model)
    watched.add_loss(model(x), HALVES)
    products = FisherProducts(model, Gaussian(nn.MSELoss(), None))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"neither in forward mode .* lr and momentum"):
            products(watched.recorder.calls, directions(model), 1.0)


def test_buffers_that_a_call_changes_are_those_before_it() -> None:
    """Each forward pass of a spectral norm makes another step of its power iteration."""
    model = spectral().double()
    twin = copy.deepcopy(model)
    watched = Watched(model)
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    for _ in range(2):
        watched.add_loss(model(x), y)
    expected = 0.0
    for _ in range(2):
        state = copy.deepcopy(twin)
        j = jacobian(twin, x)
        hessian = loss_hessian(state(x), y, nn.MSELoss(reduction="sum"))
        expected = expected + j.T @ hessian @ j / 12
    d = directions(model)
    after = everything(model)
    products = FisherProducts(model, Gaussian(nn.MSELoss(), None))
    found = products(watched.recorder.calls, d, 12.0)
    torch.testing.assert_close(found, matrix(d) @ expected @ matrix(d).T, **EXACT)
    for a, b in zip(after, everything(model), strict=True):
        assert torch.equal(a, b)


def test_parameters_that_are_left_out_do_not_move() -> None:
    model = Net().double()
    watched = Watched(model)
    watched.add_loss(model(batch()), HALVES)
    products = FisherProducts(model, Gaussian(nn.MSELoss(), None))
    full = directions(model)
    some = [{p: d for p, d in each.items() if p is not model.mix.weight} for each in full]
    zero = [{p: d * (p is not model.mix.weight) for p, d in each.items()} for each in full]
    for mode in ("forward", "double-backward"):
        products.jacobian.mode = mode
        a, b = (products(watched.recorder.calls, d, 1.0) for d in (some, zero))
        torch.testing.assert_close(a, b, **EXACT)
        nothing = products(watched.recorder.calls, [{}, full[0]], 1.0)
        assert nothing[0].tolist() == [0, 0]


# Between the model and the loss


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.body(x)) * scale
        return {"count": torch.ones((), dtype=torch.int64), "a": self.a(x), "b": self.b(x)}


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "classes last": (lambda o: o.transpose(1, 2), (4, 5)),
    "flattened": (lambda o: o.reshape(-1, 3), (20,)),
    "shifted": (lambda o: o[:, 1:].transpose(1, 2), (4, 4)),
    "one position": (lambda o: o[:, 2], (4,)),
    "every other": (lambda o: o[::2, -1], (2,)),
}


def check_view(view: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    model, criterion = linear(nn.Tanh()).double(), nn.CrossEntropyLoss()
    watched = Watched(model)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    y = torch.arange(torch.Size(shape).numel()).view(shape) % 3
    state = torch.get_rng_state()
    watched.add_loss(view(model(x)), y)
    through = nn.Sequential(model, Apply(view))
    d = directions(model)
    expected = matrix(d) @ dense(through, state, x, criterion, y) @ matrix(d).T
    found = FisherProducts(model, CrossEntropy(criterion, None))(
        watched.recorder.calls, d, y.numel()
    )
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", VIEWS)
def test_a_loss_may_use_a_view_of_the_output(name: str) -> None:
    check_view(*VIEWS[name])


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_losses_of_several_heads_add_up(share: float) -> None:
    model = Heads().double()
    watched = Watched(model)
    x, scale = torch.randn(4, 3).double(), torch.tensor(1.7).double()
    output = model(x, scale=scale)
    targets = {"b": torch.randn(4, 2).double(), "a": torch.randn(4, 3).double()}
    for head, weight in (("b", share), ("a", 1.0)):
        watched.add_loss(output[head], targets[head], share=weight)
    assert len(watched.recorder.calls) == 1
    expected = 0.0
    for head, weight in (("b", share), ("a", 1.0)):
        alone = nn.ModuleDict({"m": model})
        alone.forward = lambda x, head=head: model(x, scale=scale)[head]  # type: ignore
        j = jacobian(alone, x)
        expected = expected + weight * 2 * j.T @ j
    d = directions(model)
    found = FisherProducts(model, Gaussian(nn.MSELoss(), None))(watched.recorder.calls, d, 1.0)
    torch.testing.assert_close(found, matrix(d) @ expected @ matrix(d).T, **EXACT)


def shifted(output: Tensor) -> Tensor:
    return output[:, 1:].reshape(-1, 3)


def test_a_selector_may_compute_the_input_of_the_loss() -> None:
    model, criterion = linear(nn.Tanh()).double(), nn.CrossEntropyLoss()
    watched = Watched(model, shifted)
    x, y = torch.randn(4, 5, 3, dtype=torch.float64), torch.arange(16) % 3
    watched.add_loss(shifted(model(x)), y)
    j = jacobian(nn.Sequential(model, Apply(shifted)), x)
    expected = j.T @ loss_hessian(shifted(model(x)), y, criterion) @ j
    d = directions(model)
    found = FisherProducts(model, CrossEntropy(criterion, None))(watched.recorder.calls, d, 16.0)
    torch.testing.assert_close(found, matrix(d) @ expected @ matrix(d).T, **EXACT)


def test_a_loss_of_something_else_is_refused() -> None:
    model = linear().double()
    watched = Watched(model)
    output = model(torch.randn(4, 3).double())
    for other in (output * 2, output.detach().clone(), output.log_softmax(1)):
        with pytest.raises(RuntimeError, match="not what the model returned, nor a view"):
            watched.add_loss(other, CLASSES)
    output /= 2
    with pytest.raises(RuntimeError, match="not what the model returned, nor a view"):
        watched.add_loss(output, CLASSES)


def test_a_selector_that_picks_another_shape_is_refused() -> None:
    model = linear().double()
    watched = Watched(model, lambda output: output[:, :2])
    watched.add_loss(model(torch.randn(4, 3).double()) * 2, CLASSES)
    products = FisherProducts(model, CrossEntropy(nn.CrossEntropyLoss(), None))
    with pytest.raises(RuntimeError, match=r"shape \(4, 3\), but outputs= picks .* \(4, 2\)"):
        products(watched.recorder.calls, directions(model), 1.0)


@pytest.mark.parametrize("which", ["input", "target", "output"])
def test_a_tensor_that_was_overwritten_is_refused(which: str) -> None:
    model = linear().double()
    watched = Watched(model)
    x, y = torch.randn(4, 3).double(), CLASSES.clone()
    output = model(x)
    watched.add_loss(output, y)
    with torch.no_grad():
        {"input": x, "target": y, "output": output}[which].zero_()
    products = FisherProducts(model, CrossEntropy(nn.CrossEntropyLoss(), None))
    with pytest.raises(RuntimeError, match="modified in place"):
        products(watched.recorder.calls, directions(model), 1.0)


def test_a_call_that_cannot_be_repeated_is_warned_of() -> None:
    counter = itertools.count(1)
    model = linear(Apply(lambda x: x * next(counter))).double()
    watched = Watched(model)
    watched.add_loss(model(torch.randn(4, 3).double()), CLASSES)
    products = FisherProducts(model, CrossEntropy(nn.CrossEntropyLoss(), None))
    with pytest.warns(UserWarning, match="gives another output"):
        products(watched.recorder.calls, directions(model), 1.0)


def test_autocast_is_as_it_was() -> None:
    model = linear(nn.Tanh())
    watched = Watched(model)
    x, d = torch.randn(4, 3), directions(model)
    products = FisherProducts(model, CrossEntropy(nn.CrossEntropyLoss(), None))
    watched.add_loss(model(x), CLASSES)
    plain = products(watched.recorder.calls, d, 4.0)
    watched.recorder.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype is torch.bfloat16
    watched.add_loss(output, CLASSES)
    (z,) = products.jacobian(watched.recorder.calls[0], d)[0]
    assert z.dtype is torch.bfloat16
    mixed = products(watched.recorder.calls, d, 4.0)
    torch.testing.assert_close(mixed, plain, rtol=0.1, atol=0.05)
    assert products.jacobian.mode == "forward"


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_run_without_their_compiled_code(inside: bool) -> None:
    model = linear(nn.Tanh()).double()
    compiled = model if inside else torch.compile(model, backend="eager")
    if inside:
        model[0] = torch.compile(model[0], backend="eager")
    watched = Watched(compiled)
    x = torch.randn(4, 3).double()
    state = torch.get_rng_state()
    watched.add_loss(compiled(x), CLASSES)
    d = directions(model)
    criterion = nn.CrossEntropyLoss()
    products = FisherProducts(unwrapped(compiled), CrossEntropy(criterion, None))
    found = products(watched.recorder.calls, d, 4.0)
    expected = dense(unwrapped(compiled), state, x, criterion, CLASSES)
    torch.testing.assert_close(found, matrix(d) @ expected @ matrix(d).T, **EXACT)
    assert products.jacobian.mode == "forward"


# What is kept, and for how long


def test_nothing_outlives_the_step_and_no_graph_the_backward_pass() -> None:
    model = linear(nn.Tanh()).double()
    watched = Watched(model)
    x = (torch.randn(4, 3).double().requires_grad_() * 2).tanh()
    output = model(x)
    watched.add_loss(output, CLASSES)
    (call,) = watched.recorder.calls
    kept = [call.args[0].tensor, call.losses[0].output.tensor, call.outputs[0].tensor]
    assert all(tensor.grad_fn is None for tensor in kept)
    node = weakref.ref(output.grad_fn.metadata.setdefault("mark", type("Mark", (), {})()))
    del output, x, kept
    gc.collect()
    assert node() is None
    watched.recorder.clear()
    reference = weakref.ref(call)
    watched.latest = None
    del call
    assert reference() is None


def test_a_call_without_a_loss_is_not_kept() -> None:
    watched = Watched(linear().double())
    watched.model(torch.randn(4, 3).double())
    reference = weakref.ref(watched.latest)
    watched.latest = None
    assert watched.recorder.calls == []
    assert reference() is None


# Mutants


def no_random_states(original: Callable, self: RecordedCall, *arguments: Any) -> Any:
    states, self.random_states = self.random_states, {}
    try:
        return original(self, *arguments)
    finally:
        self.random_states = states


def without_warnings(test: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with warnings.catch_warnings(action="ignore"):
            test()

    return run


def only_first_loss(original: Callable, self: Any, loss: Any, tangents: Any) -> Tensor:
    share, examples = loss.share, loss.examples
    return original(self, loss, tangents) * (1.0 if share and examples == 4 else 0.0)


MUTANTS: dict[str, tuple[object, str, Callable, Callable[[], Any]]] = {
    "cross-entropy not centred": (
        CrossEntropy,
        "root_product",
        lambda original, self, rows, z: rows.softmax(1).sqrt() * z,
        lambda: check_products("cross-entropy"),
    ),
    "σ in place of σ(1 − σ)": (
        Bernoulli,
        "root_product",
        lambda original, self, rows, z: rows.sigmoid().sqrt() * z,
        lambda: check_products("binary"),
    ),
    "squared error without its 2": (
        Gaussian,
        "root_product",
        lambda original, self, rows, z: z,
        lambda: check_products("squared error"),
    ),
    "class weights ignored": (
        CrossEntropy,
        "curvature_weights",
        lambda original, self, output, target, rows: torch.ones_like(rows[:, :1]),
        lambda: check_products("class weights"),
    ),
    "pos_weight ignored": (
        Bernoulli,
        "curvature_weights",
        lambda original, self, output, target, rows: torch.ones_like(rows[:, :1]),
        lambda: check_products("pos_weight"),
    ),
    "first micro-batch only": (
        FisherProducts,
        "_through_loss",
        only_first_loss,
        lambda: check_products("cross-entropy"),
    ),
    "another draw of the dropout": (
        RecordedCall,
        "run",
        no_random_states,
        without_warnings(lambda: check_products("cross-entropy")),
    ),
    "examples taken together": (
        kfac.fisher_products,
        "hessian_products",
        lambda original, likelihood, output, target, tangents, examples: sum(
            torch.stack([(v * z).sum() for z in tangents])[:, None]
            * torch.stack([(v * z).sum() for z in tangents])
            for v in likelihood.vectors(output, target, examples)
        ),
        lambda: check_products("pos_weight", wrap=Foreign),
    ),
    "running statistics updated again": (
        kfac.recorder,
        "_replace",
        lambda original, *_: None,
        check_untouched,
    ),
    "hooks react": (
        kfac.recorder,
        "silent_hooks",
        lambda original: torch.enable_grad(),
        lambda: check_untouched(double_backward=True),
    ),
    "layout of a view ignored": (
        View,
        "of",
        lambda original, self, tensor: tensor.reshape(self.size) if self.layout else tensor,
        without_warnings(lambda: check_view(*VIEWS["classes last"])),
    ),
    "forward mode not checked": (
        kfac.fisher_products.JacobianProducts,
        "_fit_backward",
        lambda original, *_: True,
        lambda: check_model("no_grad inside"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, mutant, test = MUTANTS[name]
    replace(owner, attribute, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        test()
