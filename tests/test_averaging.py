"""Averages of the parameters, and that the averaged model leaves no trace in K-FAC."""

import copy
import io
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from test_cuda import Convolutions, Tokens
from test_exactness import close
from test_gradients_untouched import FISHERS
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from kfac import KFAC
from kfac.averaging import parameter_average

# BatchNorm stands where the examples of a batch may mix.
pytestmark = pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")

NETS: dict[str, type[nn.Module]] = {"convolutions": Convolutions, "tokens": Tokens}


class Run:
    """A model in training, and its average."""

    def __init__(self, name: str = "convolutions", **settings: Any) -> None:
        torch.manual_seed(0)
        self.model, self.criterion = NETS[name]().double(), nn.CrossEntropyLoss()
        self.generator = torch.Generator().manual_seed(1)
        if settings.pop("criterion", True):
            settings["criterion"] = self.criterion
        self.optimizer = KFAC(self.model, lr=0.1, factor_update_period=1, **settings)

    def step(self, evaluate: Callable[[Tensor, Tensor], None] = lambda x, y: None) -> None:
        x, y = self.model.batch(self.generator)
        self.optimizer.zero_grad()
        evaluate(x, y)
        loss = self.criterion(self.model(x), y)
        evaluate(x, y)
        loss.backward()
        evaluate(x, y)
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8, 0.99])
def test_the_average_follows_its_formula(decay: float) -> None:
    run = Run()
    averaged = AveragedModel(run.model, multi_avg_fn=parameter_average(decay))
    history = []
    for _ in range(8):
        run.step()
        averaged.update_parameters(run.model)
        history.append(run.values())
        for found, *seen in zip(averaged.parameters(), *history, strict=True):
            close(found.detach(), oracles.parameter_average(seen, decay))


def test_the_default_is_that_of_the_paper() -> None:
    run = Run()
    models = [
        AveragedModel(run.model, multi_avg_fn=average)
        for average in (parameter_average(), parameter_average(0.99))
    ]
    for _ in range(3):
        run.step()
        for model in models:
            model.update_parameters(run.model)
    assert all(map(torch.equal, *(list(model.parameters()) for model in models)))


@pytest.mark.parametrize("decay", [-0.1, 1.0, torch.nan, None, "0.9"])
def test_a_bad_decay_is_refused(decay: Any) -> None:
    with pytest.raises(ValueError, match=r"parameter_average\(decay=\.\.\.\) must be a number in"):
        parameter_average(decay)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", NETS)
def test_evaluating_the_average_leaves_no_trace(name: str, fisher: str) -> None:
    """In training and evaluation mode, with and without gradients, by criterion and function."""
    settings = {"criterion": False, **FISHERS[fisher]}
    plain, run = Run(name, **settings), Run(name, **settings)
    averaged = AveragedModel(run.model, multi_avg_fn=parameter_average(0.5))

    def evaluate(x: Tensor, y: Tensor) -> None:
        x = 2 * x if x.is_floating_point() else x
        for mode in (True, False):
            averaged.train(mode)
            with torch.no_grad():
                run.criterion(averaged(x), y)
            (run.criterion(averaged(x), y) + F.cross_entropy(averaged(x), y)).backward()

    for _ in range(4):
        plain.step()
        run.step(evaluate)
        averaged.update_parameters(run.model)
    assert all(map(torch.equal, plain.values(), run.values()))
    assert plain.optimizer.diagnostics() == run.optimizer.diagnostics()
    for layer in plain.optimizer._engine.blocks.layers:
        pairs = zip(plain.optimizer.factor(layer), run.optimizer.factor(layer), strict=True)
        assert all(mine is theirs or torch.equal(mine, theirs) for mine, theirs in pairs)


def test_buffers_are_treated_as_torch_documents() -> None:
    run = Run()
    latest, mean = (
        AveragedModel(run.model, multi_avg_fn=parameter_average(0.8), use_buffers=use)
        for use in (False, True)
    )
    seen = []
    for _ in range(3):
        run.step()
        latest.update_parameters(run.model)
        mean.update_parameters(run.model)
        seen.append(run.model[1].running_var.clone())
    assert torch.equal(latest.module[1].running_var, seen[-1])
    close(mean.module[1].running_var, oracles.parameter_average(seen, 0.8))
    assert mean.module[1].num_batches_tracked == 3

    factors = run.optimizer.factor("0")
    data = [run.model.batch(run.generator) for _ in range(3)]
    update_bn(data, latest)
    with torch.no_grad():
        inputs = [latest.module[0](x) for x, _ in data]
    expected = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    close(latest.module[1].running_var, expected)
    assert all(map(torch.equal, factors, run.optimizer.factor("0")))
    assert not torch.equal(run.model[1].running_var, latest.module[1].running_var)


def test_an_averaged_model_is_saved_and_resumed() -> None:
    run = Run()
    whole = AveragedModel(run.model, multi_avg_fn=parameter_average(0.8))
    for _ in range(2):
        run.step()
        whole.update_parameters(run.model)
    file = io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    resumed = AveragedModel(copy.deepcopy(run.model), multi_avg_fn=parameter_average(0.8))
    resumed.load_state_dict(whole.state_dict())
    run.step()
    for averaged in (whole, pickled, resumed):
        averaged.update_parameters(run.model)
        assert all(map(torch.equal, whole.parameters(), averaged.parameters()))
