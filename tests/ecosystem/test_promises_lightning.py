"""Lightning's automatic optimization with K-FAC equals a plain loop, bit for bit."""

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel

from kfac import KFAC, LevenbergMarquardt

pytestmark = [
    pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed"),
    pytest.mark.promise("Lightning, automatic optimization"),
    pytest.mark.filterwarnings("ignore::Warning:lightning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
PLAIN: dict[str, Any] = {
    "lr": 0.1, "fisher": "mc", "factor_update_period": 2, "inverse_update_period": 3,
}  # fmt: skip
AUTOMATIC: dict[str, Any] = {
    "lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt(period=2),
}  # fmt: skip
BATCHES, EPOCHS = 4, 3


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


class Batches:
    """The batches of an epoch; tells which come next, so that a run resumes within an epoch."""

    def __init__(self) -> None:
        x = torch.randn(BATCHES, 6, 3, generator=torch.Generator().manual_seed(2))
        self.batches = list(zip(x, (x[..., 0] > 0).long(), strict=True))
        self.given = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.given % BATCHES, BATCHES):
            self.given = number + 1
            yield self.batches[number]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def learner(settings: dict[str, Any], *, whole: bool = False) -> Any:
    """A `LightningModule` with a net, of which K-FAC is given either."""
    import lightning

    class Learner(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = net(), nn.CrossEntropyLoss()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x)
            return output

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, y = batch
            loss: Tensor = self.criterion((self if whole else self.net)(x), y)
            return loss

        def configure_optimizers(self) -> Any:
            model = self if whole else self.net
            optimizer = KFAC(model, criterion=self.criterion, **settings)
            if settings["lr"] == "auto":
                return optimizer
            scheduler = CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Learner()


def fit(
    folder: Path, module: Any, *, resume: Path | None = None, **settings: Any
) -> dict[str, Tensor]:
    """Train and return the parameters and buffers of the net."""
    import lightning

    quiet = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": "callbacks" in settings,
    }  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder,
        **{"max_epochs": EPOCHS} | quiet | settings,
    )  # fmt: skip
    trainer.fit(module, Batches(), ckpt_path=resume)
    return dict(module.net.state_dict())


Edit = Callable[[Iterable[nn.Parameter]], Any]


def by_hand(
    settings: dict[str, Any],
    *,
    accumulate: int = 1,
    edit: Edit | None = None,
    autocast: bool = False,
    average: bool = False,
) -> dict[str, Tensor]:
    """The same training as a plain loop."""
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **settings)
    scheduler = CosineAnnealingLR(optimizer, BATCHES * EPOCHS) if settings["lr"] != "auto" else None
    averaged = AveragedModel(model, use_buffers=True) if average else None
    for _ in range(EPOCHS):
        batches = list(Batches())
        for first in range(0, BATCHES, accumulate):

            def closure(members: list[Any] = batches[first : first + accumulate]) -> Tensor:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    losses = [criterion(model(x), y) / accumulate for x, y in members]
                for loss in losses:
                    loss.backward()
                if edit is not None:
                    edit(model.parameters())
                return torch.stack(losses).sum().detach()

            optimizer.step(closure)
            if scheduler is not None:
                scheduler.step()
            if averaged is not None:
                averaged.update_parameters(model)
    return dict((averaged.module if averaged is not None else model).state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [PLAIN, AUTOMATIC], ids=["plain", "automatic"])
@pytest.mark.parametrize("whole", [False, True], ids=["net", "LightningModule"])
def test_training_equals_a_plain_loop(
    settings: dict[str, Any], whole: bool, tmp_path: Path
) -> None:
    assert_same(fit(tmp_path, learner(settings, whole=whole)), by_hand(settings))


@pytest.mark.parametrize(
    ("algorithm", "edit"),
    [
        ("norm", lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1)),
        ("value", lambda parameters: nn.utils.clip_grad_value_(parameters, 0.1)),
    ],
    ids=["norm", "value"],
)
def test_gradients_are_clipped(algorithm: str, edit: Edit, tmp_path: Path) -> None:
    clipping = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    assert_same(fit(tmp_path, learner(PLAIN), **clipping), by_hand(PLAIN, edit=edit))


@pytest.mark.parametrize(
    "settings", [PLAIN, {"lr": "auto", "momentum": "auto"}], ids=["plain", "automatic"]
)
def test_gradients_are_accumulated(settings: dict[str, Any], tmp_path: Path) -> None:
    found = fit(tmp_path, learner(settings), accumulate_grad_batches=2)
    assert_same(found, by_hand(settings, accumulate=2))


def test_levenberg_marquardt_refuses_gradients_from_before_the_closure(tmp_path: Path) -> None:
    """The closure's loss is that of the last micro-batch only, so ρ would be wrong."""
    with pytest.raises(RuntimeError, match="accumulated before the closure"):
        fit(tmp_path, learner(AUTOMATIC), accumulate_grad_batches=2)


def test_bfloat16_equals_a_plain_loop_under_autocast(tmp_path: Path) -> None:
    found = fit(tmp_path, learner(PLAIN), precision="bf16-mixed")
    assert_same(found, by_hand(PLAIN, autocast=True))


@pytest.mark.parametrize("settings", [PLAIN, AUTOMATIC], ids=["plain", "automatic"])
@pytest.mark.parametrize("stop", [4, 6], ids=["after an epoch", "within an epoch"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    settings: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    saving = ModelCheckpoint(
        tmp_path,
        filename="{step}",
        save_top_k=-1,
        every_n_train_steps=stop,
        save_on_train_epoch_end=False,
    )
    whole = fit(tmp_path, learner(settings), callbacks=[saving])
    resumed = fit(tmp_path, learner(settings), resume=tmp_path / f"step={stop}.ckpt")
    assert_same(resumed, whole)


def test_the_wrapped_optimizer_reports(tmp_path: Path) -> None:
    module = learner(PLAIN)
    fit(tmp_path, module)
    assert module.optimizers().diagnostics()["steps"] == BATCHES * EPOCHS


def test_weights_are_averaged(tmp_path: Path) -> None:
    pytest.importorskip("lightning", minversion="2.6")
    from lightning.pytorch.callbacks import WeightAveraging

    found = fit(tmp_path, learner(PLAIN), callbacks=[WeightAveraging()], enable_checkpointing=False)
    assert_same(found, by_hand(PLAIN, average=True))
