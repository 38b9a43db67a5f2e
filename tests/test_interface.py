"""What the interface promises beyond the maths, each in a test named after the promise."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac import KFAC, Cholesky, Likelihood, Preconditioner

X = torch.linspace(-1, 1, 24).view(8, 3)
Y = torch.arange(8) % 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: Any, criterion: nn.Module) -> None:
    optimizer.zero_grad()
    criterion(model(X), Y).backward()
    optimizer.step()


@pytest.mark.promise("closures, gradient accumulation")
def test_a_closure_is_evaluated_once_and_its_loss_returned() -> None:
    model, criterion, calls = net(), nn.CrossEntropyLoss(), []
    twin = copy.deepcopy(model)
    optimizer, other = (KFAC(m, lr=0.1, criterion=criterion) for m in (model, twin))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(X), Y)
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
    step(twin, other, criterion)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_preconditioner_before_sgd_equals_kfac_without_trust_region() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    kfac = KFAC(model, lr=0.1, damping=0.01, criterion=criterion, kl_clip=None)
    preconditioner = Preconditioner(twin, damping=0.01, criterion=criterion)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, kfac, criterion)
        sgd.zero_grad()
        criterion(twin(X), Y).backward()
        preconditioner.step()
        sgd.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_damping_may_differ_between_groups() -> None:
    moved = []
    for damping in (1e-2, 1e2):
        model = net()
        groups = [
            {"params": model[0].parameters(), "damping": damping},
            {"params": model[2].parameters(), "damping": lambda step: 1.0},
        ]
        optimizer = KFAC(model, groups, lr=0.1, kl_clip=None, inverse="eigen")
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer, nn.CrossEntropyLoss())
        moved.append([p - b for p, b in zip(model.parameters(), before, strict=True)])
    assert moved[0][0].norm() > 10 * moved[1][0].norm()
    assert torch.equal(moved[0][2], moved[1][2])


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_a_damping_schedule_takes_effect(inverse: Any) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, kl_clip=None, criterion=criterion, inverse=inverse,
        damping=lambda step: 10.0**step, inverse_update_period=1,
    )  # fmt: skip
    for count in range(4):
        before = model[0].weight.detach().clone()
        step(model, optimizer, criterion)
        assert optimizer.diagnostics()["damping"] == 10.0**count
    gradient = model[0].weight.grad
    torch.testing.assert_close((before - model[0].weight) * 1e3, gradient, rtol=1e-2, atol=1e-3)


def test_periods_decide_when_factors_and_inverses_change() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=0.1, criterion=criterion, factor_update_period=lambda step: 2,
        inverse_update_period=3, stagger_refreshes=False,
    )  # fmt: skip
    updates = []
    for _ in range(6):
        step(model, optimizer, criterion)
        diagnostics = optimizer.diagnostics()
        updates.append((diagnostics["factor_updates"], diagnostics["inverse_refreshes"]))
    assert updates == [(1, 2), (1, 2), (2, 2), (2, 4), (3, 4), (3, 4)]


def test_between_factor_updates_nothing_is_attached_to_the_graph() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, factor_update_period=2)
    assert "Tap" in type(model(X).grad_fn).__name__
    step(model, optimizer, criterion)
    assert "Tap" not in type(model(X).grad_fn).__name__


@dataclass
class Poisson:
    """A likelihood of one's own: counts with rate exp(output)."""

    reduction: str = "mean"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.exp() - target * output).mean()

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        return torch.tensor(float(output.numel()))

    def sample(self, output: Tensor, target: Tensor | None, generator: torch.Generator) -> Tensor:
        rate = output.exp()
        return rate - torch.poisson(rate, generator)

    def num_vectors(self, output: Tensor, examples: int) -> int:
        return output.numel() // examples

    def vectors(self, output: Tensor, target: Tensor | None, examples: int) -> Iterator[Tensor]:
        for column in range(output.shape[1]):
            vector = torch.zeros_like(output)
            vector[:, column] = (output[:, column] / 2).exp()
            yield vector


@pytest.mark.promise("a loss of your own")
def test_a_likelihood_of_ones_own_gives_its_exact_fisher() -> None:
    model, loss = nn.Linear(3, 2, bias=False).double(), Poisson()
    assert isinstance(loss, Likelihood)
    x, y = X[:1].double(), torch.ones(1, 2, dtype=torch.float64)
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=0.3, kl_clip=None, inverse="eigen", criterion=loss,
        fisher="type-2",
    )  # fmt: skip
    before = model.weight.detach().clone()
    loss(model(x), y).backward()
    hessian = torch.autograd.functional.hessian(lambda w: loss(x @ w.T, y), before).view(6, 6)
    optimizer.step()
    expected = torch.linalg.solve(hessian + 0.3 * torch.eye(6), model.weight.grad.flatten())
    torch.testing.assert_close((before - model.weight).flatten(), expected, rtol=1e-8, atol=1e-10)


def test_a_likelihood_of_ones_own_may_be_sampled() -> None:
    model, loss = nn.Linear(3, 2), Poisson()
    optimizer = KFAC(model, lr=0.1, criterion=loss)
    loss(model(X), torch.ones(8, 2)).backward()
    optimizer.step()
    assert optimizer.factor("")[1].diagonal(dim1=1, dim2=2).min() > 0


class Wrapped(nn.Module):
    """Returns its logits in some container."""

    def __init__(self, container: Any) -> None:
        super().__init__()
        self.body = net()
        self.container = container

    def forward(self, x: Tensor) -> Any:
        return self.container(self.body(x))


@pytest.mark.parametrize(
    ("container", "outputs"),
    [
        (lambda logits: {"logits": logits, "aux": None}, "logits"),
        (lambda logits: (None, logits), 1),
        (lambda logits: {"deep": [logits]}, lambda output: output["deep"][0]),
    ],
)
def test_outputs_picks_the_logits_where_the_criterion_is_not_called(
    container: Any, outputs: Any
) -> None:
    model = Wrapped(container)
    optimizer = KFAC(model, lr=0.1, criterion=nn.CrossEntropyLoss(), outputs=outputs, fisher="mc")
    plain = net()
    expected = KFAC(plain, lr=0.1, criterion=nn.CrossEntropyLoss(), fisher="mc")
    F.cross_entropy(outputs(model(X)) if callable(outputs) else model(X)[outputs], Y).backward()
    optimizer.step()
    F.cross_entropy(plain(X), Y).backward()
    expected.step()
    assert torch.equal(optimizer.factor("body.0")[1], expected.factor("0")[1])


@pytest.mark.parametrize(("ignored", "shape"), [(-100, (8, 2, 5)), (1, (8, 2))])
def test_targets_that_may_be_ignored_unseen_are_warned_of(
    ignored: int, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(3, 2, 1) if len(shape) > 2 else net()
    criterion = nn.CrossEntropyLoss(ignore_index=ignored)
    optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher="mc")
    output = model(torch.randn(shape[0], 3, *shape[2:]))
    with pytest.warns(UserWarning, match="does not see the targets.*ignore_index"):
        F.cross_entropy(output, torch.zeros_like(output[:, 0]).long()).backward()
    optimizer.step()


@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_outputs_may_be_computed_anew_for_a_model_with_a_loss_of_its_own(fisher: Any) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits.flatten(0, 1), y.flatten()), "logits": logits}

    x, y = torch.randn(5, 2, 3), torch.arange(10).view(5, 2) % 4
    factors = []
    for by_criterion in (True, False):
        model, criterion = Language(), nn.CrossEntropyLoss()
        optimizer = KFAC(
            model, lr=0.1, criterion=criterion, fisher=fisher,
            outputs=lambda output: output["logits"].flatten(0, 1),
        )  # fmt: skip
        output = model(x, y)
        if by_criterion:
            criterion(output["logits"].flatten(0, 1), y.flatten()).backward()
        else:
            output["loss"].backward()
        optimizer.step()
        factors.append(optimizer.factor("body")[1])
    assert torch.equal(*factors)


@pytest.mark.promise("BatchNorm in training mode")
@pytest.mark.parametrize("fisher", ["type-2", "mc"])
@pytest.mark.parametrize("training", [True, False])
def test_type_2_warns_once_of_examples_that_mix(
    fisher: Any, training: bool, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("always")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train(training)
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher=fisher, factor_update_period=1)
    for _ in range(2):
        step(model, optimizer, criterion)
    found = [str(w.message) for w in recwarn if "examples of a batch" in str(w.message)]
    assert len(found) == (fisher == "type-2" and training)


def test_an_output_that_cannot_be_picked_is_an_error_with_the_remedy() -> None:
    model = Wrapped(lambda logits: {"logits": logits})
    optimizer = KFAC(model, lr=0.1, criterion=nn.CrossEntropyLoss())
    F.cross_entropy(model(X)["logits"], Y).backward()
    with pytest.raises(RuntimeError, match=r"no statistics were collected.*outputs="):
        optimizer.step()


def test_a_model_that_computes_its_own_loss_with_the_criterion_works() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.criterion = net(), nn.CrossEntropyLoss()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.criterion(self.body(x), y)

    model, plain, criterion = WithLoss(), net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=model.criterion, fisher="type-2")
    expected = KFAC(plain, lr=0.1, criterion=criterion, fisher="type-2")
    model(X, Y).backward()
    optimizer.step()
    step(plain, expected, criterion)
    assert torch.equal(optimizer.factor("body.0")[1], expected.factor("0")[1])


@pytest.mark.promise("calling a part of the model only")
def test_calling_only_a_part_of_the_model_is_an_error_with_the_remedy() -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1)
    model[2](model[1](model[0](X))).square().mean().backward()
    with pytest.raises(RuntimeError, match="Call the model that K-FAC was given"):
        optimizer.step()


def test_too_many_exact_vectors_are_refused_with_the_number() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher="type-2", max_vectors=1)
    with pytest.raises(ValueError, match=r"max_vectors=\.\.\.\) must be >= 2.*fisher='mc'"):
        criterion(model(X), Y).backward()
    assert optimizer.diagnostics()["steps"] == 0


@pytest.mark.parametrize("width", [3, 4])
def test_outputs_that_are_combined_element_by_element_keep_their_examples_apart(width: int) -> None:
    model, criterion = nn.Linear(3, width), nn.MSELoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher="type-2")
    criterion(model(X) - model(X + 1), torch.zeros(8, width)).backward()
    optimizer.step()
    # Each of the two calls has G = 2/width per example and output.
    expected = 2 * 2 / width * torch.eye(width).unsqueeze(0)
    torch.testing.assert_close(optimizer.factor("")[1], expected)


def test_torch_func_transforms_pass_through_the_hooks() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return criterion(torch.func.functional_call(model, values, (X,)), Y)

    gradients = torch.func.grad(loss)(parameters)
    step(model, optimizer, criterion)
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.promise("an optimizer that is replaced")
def test_an_optimizer_that_is_gone_leaves_dead_hooks() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    step(model, optimizer, criterion)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert "Tap" not in type(model(X).grad_fn).__name__
    criterion(model(X), Y).backward()


@pytest.mark.promise("an optimizer that is replaced")
def test_removed_hooks_leave_a_plain_model() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    step(model, optimizer, criterion)
    optimizer.remove_hooks()
    modules = [*model.modules(), criterion]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    factors = optimizer.factor("0")
    step(model, optimizer, criterion)
    assert all(map(torch.equal, factors, optimizer.factor("0")))


def test_a_hooked_model_can_be_pickled_saved_and_copied() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    step(model, optimizer, criterion)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        copy.deepcopy(model),
    ]
    size = len(pickle.dumps(model)) - len(pickle.dumps(net()))
    assert size < 2000  # the hooks, not the optimizer behind them
    factors = optimizer.factor("0")
    for other in copies:
        criterion(other(X), Y).backward()
        assert torch.equal(other(X), model(X))
    step(model, optimizer, criterion)
    assert optimizer.diagnostics()["steps"] == 2
    assert all(map(torch.equal, factors, optimizer.factor("0")))


@pytest.mark.promise("a forward pass without a backward pass")
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("by_function", [False, True])
def test_evaluation_with_gradients_keeps_no_graph_alive(fisher: Any, by_function: bool) -> None:
    model, criterion = net().eval(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher=fisher)
    alive = []
    for _ in range(4):
        x = X.clone()
        alive.append(weakref.ref(x))
        loss = F.cross_entropy if by_function else criterion
        loss(model(x), Y)
        del x
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 1
    step(model, optimizer, criterion)
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_a_layer_that_is_used_without_its_module_is_reported_and_trained() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ self.inner.weight.T + self.inner.bias)

    model, criterion = Functional(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    before = model.inner.weight.detach().clone()
    with pytest.warns(UserWarning, match="'inner' has a gradient but produced no statistics"):
        step(model, optimizer, criterion)
    assert not torch.equal(before, model.inner.weight)


def test_a_layer_that_did_not_run_is_left_alone() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            return self.unused(x) if other else self.used(x)

    model, criterion = Branches(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, factor_update_period=1)
    before = model.unused.weight.detach().clone()
    step(model, optimizer, criterion)
    assert torch.equal(before, model.unused.weight)
    criterion(model(X, other=True), Y).backward()
    optimizer.step()
    assert not torch.equal(before, model.unused.weight)


def test_a_double_backward_does_not_feed_the_empirical_fisher() -> None:
    def factors(penalty: bool) -> tuple[Tensor | None, Tensor | None]:
        model = net()
        optimizer = KFAC(model, lr=0.1)
        if penalty:
            x = X.clone().requires_grad_()
            torch.autograd.grad(model(x).sum(), x, create_graph=True)
        model(X).square().mean().backward()
        optimizer.step()
        return optimizer.factor("0")

    assert all(map(torch.equal, factors(False), factors(True)))


@pytest.mark.parametrize("settings", [{}, {"criterion": True, "fisher": "type-2"}])
def test_derivatives_by_an_input_do_not_feed_the_factors(settings: dict[str, Any]) -> None:
    def factors(attacks: int) -> tuple[Tensor | None, Tensor | None]:
        model, criterion = net(), nn.CrossEntropyLoss()
        chosen = settings | ({"criterion": criterion} if settings else {})
        optimizer = KFAC(model, lr=0.1, **chosen)
        x = X.clone().requires_grad_()
        for _ in range(attacks):
            torch.autograd.grad(criterion(model(x), Y), x)
        criterion(model(X), Y).backward()
        optimizer.step()
        return optimizer.factor("0")

    assert all(map(torch.equal, factors(0), factors(3)))


def test_gradients_taken_by_hand_count_like_a_backward_pass() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    optimizer, other = (KFAC(m, lr=0.1, criterion=criterion) for m in (model, twin))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(criterion(model(X), Y), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    step(twin, other, criterion)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.one(features), self.two(features)


@pytest.mark.promise("several losses on one forward pass (heads, auxiliary losses)")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_curvatures_of_several_heads_add_up(reduction: Any) -> None:
    def body_factor(*heads: int) -> Tensor:
        model, criterion = Heads(), nn.CrossEntropyLoss(reduction=reduction)
        optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher="type-2")
        outputs = model(X)
        sum(criterion(outputs[head], Y) for head in heads).backward()
        optimizer.step()
        return optimizer.factor("body")[1]

    torch.testing.assert_close(body_factor(0, 1), body_factor(0) + body_factor(1))


def test_heads_with_different_numbers_of_terms_are_each_a_mean() -> None:
    def body_factor(*ignored: int) -> Tensor:
        model, criterion = Heads(), nn.CrossEntropyLoss()
        optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher="type-2")
        outputs = model(X)
        losses = []
        for head, count in enumerate(ignored):
            target = Y.clone()
            target[:count] = -100
            if count < 8:
                losses.append(criterion(outputs[head], target))
        sum(losses).backward()
        optimizer.step()
        return optimizer.factor("body")[1]

    torch.testing.assert_close(body_factor(0, 6), body_factor(0, 8) + body_factor(8, 6))


@pytest.mark.promise("several calls of the criterion on one output (mixed targets)")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mixed_targets_on_one_output_count_once(reduction: Any) -> None:
    def moved(mix: bool) -> list[Tensor]:
        model, criterion = net(), nn.CrossEntropyLoss(reduction=reduction)
        optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher="type-2", kl_clip=None)
        output = model(X)
        criterion(output, Y)  # for a log, never differentiated
        loss = criterion(output, Y)
        if mix:
            loss = 0.3 * loss + 0.7 * criterion(output, Y)
        loss.backward()
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    for mixed, plain in zip(moved(True), moved(False), strict=True):
        torch.testing.assert_close(mixed, plain)


def test_a_first_batch_without_use_is_made_up_for() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    optimizer.step()
    criterion(model(X * float("nan")), Y).backward()
    optimizer.step()
    assert optimizer.factor("0")[0].count_nonzero() == 0
    step(model, optimizer, criterion)
    assert optimizer.factor("0")[0].count_nonzero() > 0
    assert optimizer.diagnostics()["dropped_statistics"] == 2


def test_a_late_layer_leaves_the_inverses_of_its_bucket_alone() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, late: bool = False) -> Tensor:
            return self.late(x) if late else self.early(x)

    model, criterion = Branches(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, factor_update_period=1)

    def inverse() -> Tensor:
        return optimizer.state_dict()["kfac"]["layers"]["early"]["inverse"]["A_inverse"]

    step(model, optimizer, criterion)
    before = inverse()
    optimizer.zero_grad()
    criterion(model(2 * X) + model(X, late=True), Y).backward()
    optimizer.step()
    assert torch.equal(before, inverse())
    assert optimizer.state_dict()["kfac"]["layers"]["late"]["ready"]


def test_a_pass_that_fails_half_way_leaves_nothing_pending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    settings = {"lr": 0.1, "fisher": "type-2", "weight_sharing": "reduce"}
    optimizer = KFAC(model, criterion=criterion, **settings)
    grad, calls = torch.autograd.grad, []

    def fails_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return grad(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", fails_at_the_second)
        with pytest.raises(MemoryError):
            criterion(model(X), Y).backward()
    step(model, optimizer, criterion)
    plain, plain_criterion = net(), nn.CrossEntropyLoss()
    expected = KFAC(plain, criterion=plain_criterion, **settings)
    step(plain, expected, plain_criterion)
    assert all(map(torch.equal, optimizer.factor("0"), expected.factor("0")))


@pytest.mark.promise("a forward pass without a backward pass")
def test_several_unclaimed_evaluation_forwards_are_refused() -> None:
    model = net().eval()
    optimizer = KFAC(model, lr=0.1, criterion=nn.CrossEntropyLoss())
    loss = F.cross_entropy(model(X), Y) + F.cross_entropy(model(X), Y)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        loss.backward()
    assert optimizer.diagnostics()["steps"] == 0


def test_keyword_input_and_keyword_criterion_work() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 2)

        def forward(self, *, features: Tensor) -> Tensor:
            return self.body(input=features)

    model, criterion = Keyword(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    criterion(target=Y, input=model(features=X)).backward()
    optimizer.step()
    assert optimizer.diagnostics()["factor_updates"] == 1


@pytest.mark.promise("`model.to(dtype)` after steps")
def test_the_model_may_move_and_change_dtype_after_construction() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, inverse=Cholesky())
    model.double()
    optimizer.zero_grad()
    criterion(model(X.double()), Y).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_steps_like_the_plain_one() -> None:
    plain, criterion = net(), nn.CrossEntropyLoss()
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    optimizers = [KFAC(m, lr=0.1, criterion=criterion, fisher="type-2") for m in (plain, compiled)]
    for model, optimizer in zip((plain, compiled), optimizers, strict=True):
        for _ in range(3):
            step(model, optimizer, criterion)
    for mine, theirs in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    names = [row.parameter for row in optimizers[1].summary()]
    assert names == [name for name, _ in plain.named_parameters()]


@pytest.mark.promise("`nn.Linear`")
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (2, 1, 4, 3)])
def test_linear_layers_take_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    optimizer = KFAC(model, lr=0.1, loss_terms=1)
    model(torch.ones(shape)).square().mean().backward()
    optimizer.step()
    expected = torch.ones(1, 4, 4)
    torch.testing.assert_close(optimizer.factor("0")[0], expected)


@pytest.mark.promise("inputs without a batch axis")
def test_an_unbatched_image_is_a_batch_of_one() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2))
    optimizer = KFAC(model, lr=0.1, loss_terms=1)
    model(torch.ones(2, 4, 4)).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.factor("0")[0], torch.ones(1, 9, 9))


@pytest.mark.usefixtures("no_blocks")
def test_diagonal_factors_are_the_diagonals_of_the_dense_ones() -> None:
    found = {}
    for limit in (1000, 3):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 4)
        )
        criterion = nn.MSELoss()
        optimizer = KFAC(model, lr=0.1, criterion=criterion, fisher="type-2", max_factor_dim=limit)
        criterion(model(torch.randn(4, 2, 3, 3)), torch.zeros(4, 4)).backward()
        optimizer.step()
        found[limit] = [optimizer.factor(name) for name in ("0", "2", "3")]
    for dense, small in zip(found[1000], found[3], strict=True):
        for one, other in zip(dense, small, strict=True):
            expected = one.diagonal(dim1=1, dim2=2) if other.dim() == 2 else one
            torch.testing.assert_close(other, expected)


@pytest.mark.usefixtures("no_blocks")
@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_diagonal_factors_are_inverted_like_dense_diagonal_ones(inverse: Any) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 5).double(), nn.MSELoss()
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=0.1, kl_clip=None, criterion=criterion,
        fisher="type-2", inverse=inverse, max_factor_dim=5,
    )  # fmt: skip
    before = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach()
    criterion(model(torch.randn(4, 6).double()), torch.zeros(4, 5).double()).backward()
    gradient = torch.cat([model.weight.grad, model.bias.grad.unsqueeze(1)], 1)
    optimizer.step()
    a, g = (factor[0] for factor in optimizer.factor(""))
    a = torch.diag(a)
    if inverse == "eigen":
        expected = torch.linalg.solve(torch.kron(g, a) + 0.1 * torch.eye(35), gradient.flatten())
    else:
        pi = ((a.trace() / 7) / (g.trace() / 5)).sqrt()
        damped_a = a + pi * 0.1**0.5 * torch.eye(7).double()
        damped_g = g + 0.1**0.5 / pi * torch.eye(5).double()
        expected = (torch.linalg.inv(damped_g) @ gradient @ torch.linalg.inv(damped_a)).flatten()
    moved = before - torch.cat([model.weight, model.bias.unsqueeze(1)], 1)
    torch.testing.assert_close(moved.flatten(), expected, rtol=1e-8, atol=1e-10)
