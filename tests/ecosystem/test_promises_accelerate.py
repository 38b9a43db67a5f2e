"""Loops with `accelerate` equal plain loops, bit for bit."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from kfac import KFAC, LevenbergMarquardt

pytestmark = [
    pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed"),
    pytest.mark.promise("accelerate"),
]
SETTINGS: dict[str, Any] = {
    "lr": 0.1, "fisher": "mc", "factor_update_period": 2, "inverse_update_period": 3,
}  # fmt: skip
BATCHES, STEPS = 4, 8


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate keeps its settings in singletons."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def loader() -> DataLoader[Any]:
    x = torch.randn(6 * BATCHES, 3, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=6)


class Run:
    """A model, its optimizer and a scheduler, prepared by an `Accelerator`."""

    def __init__(self, *, prepare_first: bool = False, **accelerator: Any) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True, **accelerator)
        self.criterion = nn.CrossEntropyLoss()
        model = net()
        if prepare_first:
            model = self.accelerator.prepare(model)
        optimizer = KFAC(model, criterion=self.criterion, **SETTINGS)
        scheduler = CosineAnnealingLR(optimizer, STEPS)
        if prepare_first:
            prepared = (model, *self.accelerator.prepare(optimizer, loader(), scheduler))
        else:
            prepared = self.accelerator.prepare(model, optimizer, loader(), scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared

    def train(self, epochs: int) -> dict[str, Tensor]:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.criterion(self.model(x), y))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return dict(self.model.state_dict())


def by_hand(*, accumulate: int = 1, autocast: bool = False, epochs: int = 2) -> dict[str, Tensor]:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **SETTINGS)
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    for number, (x, y) in enumerate(batch for _ in range(epochs) for batch in loader()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        (criterion(output.float(), y) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("prepare_first", [False, True], ids=["prepared with it", "before it"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_equals_a_plain_loop(precision: str, prepare_first: bool) -> None:
    run = Run(mixed_precision=precision, prepare_first=prepare_first)
    assert_same(run.train(2), by_hand(autocast=precision == "bf16"))


def test_gradients_are_accumulated() -> None:
    assert_same(Run(gradient_accumulation_steps=2).train(2), by_hand(accumulate=2))


def test_automatic_steps_equal_a_plain_loop() -> None:
    from accelerate import Accelerator

    def train(accelerator: Any) -> dict[str, Tensor]:
        model, criterion, batches = net(), nn.CrossEntropyLoss(), loader()
        settings = {"lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt()}
        optimizer: Any = KFAC(model, criterion=criterion, **settings)
        if accelerator is not None:
            model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = criterion(model(x), y)
                loss.backward() if accelerator is None else accelerator.backward(loss)
                return loss

            optimizer.step(closure)
        return dict(model.state_dict())

    assert_same(train(Accelerator(cpu=True)), train(None))


def test_a_loaded_state_continues_bit_for_bit(tmp_path: Path) -> None:
    run = Run(gradient_accumulation_steps=2)
    run.train(1)
    run.accelerator.save_state(str(tmp_path), safe_serialization=False)
    expected = {name: value.clone() for name, value in run.train(2).items()}
    other = Run(gradient_accumulation_steps=2)
    other.accelerator.load_state(str(tmp_path))
    assert_same(other.train(2), expected)
    assert other.scheduler.get_last_lr() == run.scheduler.get_last_lr()


def test_an_overflow_changes_nothing_but_the_scale() -> None:
    """As on a GPU in float16: here accelerate makes no scaler, so its wrapper is given one."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(iter(loader()))
    scaler.scale(1e6 * criterion(model(x), y)).backward()
    prepared.step()
    assert scaler.get_scale() == 2.0**119
    assert optimizer.diagnostics()["steps"] == optimizer.diagnostics()["factor_updates"] == 0
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
    assert not prepared.step_was_skipped  # the step was K-FAC's to skip
