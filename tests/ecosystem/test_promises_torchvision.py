"""A loop of the shape of torchvision's classification reference, with all that it may switch on."""

import io
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel

from kfac import KFAC

pytestmark = [
    pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed"),
    pytest.mark.promise(
        "loops like torchvision's classification reference, with EMA, mixup and AMP"
    ),
    # SequentialLR steps its parts so, in some versions of torch.
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step"),
]
CLASSES, BATCHES, EPOCHS = 3, 3, 3


class ExponentialAverage(AveragedModel):
    """Of parameters and buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(
            model, avg_fn=lambda a, p, _: decay * a + (1 - decay) * p, use_buffers=True
        )


def net() -> nn.Module:
    from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

    torch.manual_seed(1)
    return nn.Sequential(
        Conv2dNormActivation(3, 6, stride=2),
        SqueezeExcitation(6, 2),
        Conv2dNormActivation(6, 8, groups=2, activation_layer=nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Mixed images with class probabilities."""
    from torchvision.transforms import v2

    torch.manual_seed(epoch)  # the reference seeds its sampler with the epoch
    mix = v2.RandomChoice([v2.MixUp(num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)])
    images, labels = torch.randn(BATCHES, 8, 3, 8, 8), torch.randint(0, CLASSES, (BATCHES, 8))
    return [mix(x, y) for x, y in zip(images, labels, strict=True)]


class Training:
    def __init__(self, fisher: Any, amp: bool) -> None:
        self.model = net()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.scaler = torch.amp.GradScaler("cpu") if amp else None
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = KFAC(
            self.model,
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=0.1, weight_decay=1e-4, nesterov=True, criterion=self.criterion, fisher=fisher,
            grad_scaler=self.scaler, factor_update_period=2, inverse_update_period=4,
        )  # fmt: skip
        warmup = LinearLR(self.optimizer, 0.1, total_iters=1)
        main = CosineAnnealingLR(self.optimizer, EPOCHS - 1)
        self.scheduler = SequentialLR(self.optimizer, [warmup, main], [1])
        self.average = ExponentialAverage(self.model, 0.8)
        self.epoch = 0
        self.means = [dict(self.model.state_dict())]

    def train_one_epoch(self) -> None:
        self.model.train()
        for x, y in batches(self.epoch):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.scaler is not None):
                loss = self.criterion(self.model(x), y)
            self.optimizer.zero_grad()
            if self.scaler is not None:
                self.scaler.scale(loss).backward()
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
            self.average.update_parameters(self.model)

    def evaluate(self) -> None:
        for model in (self.model, self.average):
            model.eval()
            with torch.inference_mode():
                for x, y in batches(self.epoch):
                    self.criterion(model(x), y)

    def train(self, epochs: int) -> None:
        while self.epoch < epochs:
            self.train_one_epoch()
            self.scheduler.step()
            self.evaluate()
            self.epoch += 1

    def parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler,
            "model_ema": self.average, "scaler": self.scaler,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def save(self, file: io.BytesIO) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save(state | {"epoch": self.epoch}, file)
        file.seek(0)

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.epoch = state["epoch"]


every_fisher = pytest.mark.parametrize("fisher", ["empirical", "mc"])
with_and_without_amp = pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])


@every_fisher
@with_and_without_amp
def test_a_resumed_run_equals_the_uninterrupted_one(fisher: str, amp: bool) -> None:
    whole, resumed, file = Training(fisher, amp), Training(fisher, amp), io.BytesIO()
    whole.train(2)
    whole.save(file)
    resumed.load(file)
    for run in (whole, resumed):
        run.train(EPOCHS)
    for name in ("model", "model_ema"):
        found, expected = (dict(run.parts()[name].state_dict()) for run in (resumed, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert whole.optimizer.diagnostics() == resumed.optimizer.diagnostics()
    assert whole.optimizer.diagnostics()["steps"] == EPOCHS * BATCHES


@every_fisher
def test_the_loss_goes_down(fisher: str) -> None:
    run = Training(fisher, amp=False)
    x, y = batches(0)[0]
    first = float(run.criterion(run.model(x), y).detach())
    run.train(EPOCHS)
    run.model.train()
    assert float(run.criterion(run.model(x), y).detach()) < first


@every_fisher
def test_the_average_holds_parameters_and_buffers_and_changes_nothing(fisher: str) -> None:
    run, alone = Training(fisher, amp=False), Training(fisher, amp=False)
    alone.evaluate = lambda: None  # type: ignore[method-assign]
    expected: dict[str, Tensor] = {}
    update = run.average.update_parameters

    def updated(model: nn.Module) -> None:
        update(model)
        for name, value in model.state_dict().items():
            old = expected.get(name, value)
            expected[name] = 0.8 * old + 0.2 * value if value.is_floating_point() else value

    run.average.update_parameters = updated  # type: ignore[method-assign]
    alone.average.update_parameters = lambda _: None  # type: ignore[method-assign]
    run.train(2)
    alone.train(2)
    found = dict(run.average.module.state_dict())
    tracked = {name: value for name, value in found.items() if value.is_floating_point()}
    torch.testing.assert_close(tracked, {name: expected[name] for name in tracked})
    torch.testing.assert_close(
        dict(run.model.state_dict()), dict(alone.model.state_dict()), rtol=0, atol=0
    )
