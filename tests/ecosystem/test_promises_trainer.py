"""Hugging Face's `Trainer` with K-FAC equals a plain loop, bit for bit."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from kfac import KFAC

pytestmark = [
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.promise("Hugging Face `Trainer`, `optimizers=(KFAC(...), scheduler)`"),
    pytest.mark.filterwarnings("ignore:The criterion object was not called"),
]
WORDS, BATCHES, EPOCHS = 11, 4, 2
PERIODS = {"lr": 0.1, "factor_update_period": 2, "inverse_update_period": 3}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def language_model(dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=6, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def loader() -> DataLoader[Any]:
    words = torch.randint(0, WORDS, (3 * BATCHES, 6), generator=torch.Generator().manual_seed(2))
    labels = torch.cat([torch.full((len(words), 1), -100), words[:, 1:]], dim=1)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(words, labels, strict=True)]
    return DataLoader(rows, batch_size=3)  # type: ignore[arg-type]


def train(
    folder: Path, model: Any, optimizer: KFAC, *, resume: str | None = None, loss: Any = None,
    **arguments: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Train with the `Trainer`, in the order of the data."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(loader())

    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    settings = TrainingArguments(
        folder, use_cpu=True, num_train_epochs=EPOCHS, max_grad_norm=0.5,
        **quiet | {"save_strategy": "no"} | arguments,
    )  # fmt: skip
    scheduler = CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
    trainer = InOrder(model, settings, optimizers=(optimizer, scheduler), compute_loss_func=loss)
    trainer.train(resume_from_checkpoint=resume)
    return dict(model.state_dict())


def by_hand(
    model: Any, optimizer: KFAC, loss_of: Callable[[Any, Tensor], Tensor], *,
    accumulate: int = 1, autocast: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    scheduler = CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
    batches = [batch for _ in range(EPOCHS) for batch in loader()]
    for number, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"]).logits
            loss = loss_of(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


def empirical(model: Any) -> KFAC:
    """The loss of a batch of 3 sequences of 6 words is the mean of 3·5 terms."""
    return KFAC(model, loss_terms=15, **PERIODS)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding: the models' own losses pad the labels instead of cutting the logits."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_empirical_fisher_needs_no_criterion(accumulate: int, tmp_path: Path) -> None:
    model, reference = language_model(), language_model()
    found = train(tmp_path, model, empirical(model), gradient_accumulation_steps=accumulate)
    optimizer = empirical(reference)
    assert_close(found, by_hand(reference, optimizer, cross_entropy, accumulate=accumulate))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_true_fisher_takes_the_criterion_in_compute_loss_func(
    accumulate: int, bf16: bool, tmp_path: Path
) -> None:
    criterion = nn.CrossEntropyLoss()

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        mean: Tensor = criterion(logits, targets)
        return mean * len(targets) / num_items_in_batch

    model, reference = language_model(), language_model()
    optimizer, by_itself = (KFAC(m, criterion=criterion, **PERIODS) for m in (model, reference))
    settings = {"gradient_accumulation_steps": accumulate, "bf16": bf16}
    found = train(tmp_path, model, optimizer, loss=loss, **settings)
    expected = by_hand(
        reference, by_itself, lambda x, y: criterion(x.float(), y),
        accumulate=accumulate, autocast=bf16,
    )  # fmt: skip
    assert_close(found, expected)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_true_fisher_works_with_the_model_s_own_loss(bf16: bool, tmp_path: Path) -> None:
    """accelerate converts the logits that the model returns, and the loss comes from the others."""
    criterion = nn.CrossEntropyLoss()
    model, reference = language_model(), language_model()
    optimizer, by_itself = (
        KFAC(m, criterion=criterion, outputs="logits", **PERIODS) for m in (model, reference)
    )
    found = train(tmp_path, model, optimizer, bf16=bf16)
    loss_of = lambda x, y: cross_entropy(x.float(), y)  # noqa: E731
    assert_close(found, by_hand(reference, by_itself, loss_of, autocast=bf16))


@pytest.mark.parametrize("stop", [4, 5], ids=["after an epoch", "within an epoch"])
def test_a_resumed_run_equals_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    def run(resume: str | None = None) -> dict[str, Tensor]:
        model = language_model(dropout=0.1)
        saving = {"save_strategy": "steps", "save_steps": stop}
        return train(tmp_path, model, empirical(model), resume=resume, **saving)

    whole = run()
    resumed = run(str(tmp_path / f"checkpoint-{stop}"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_automatic_steps_need_a_loop_with_closures(tmp_path: Path) -> None:
    model = language_model()
    optimizer = KFAC(model, momentum="auto", criterion=nn.CrossEntropyLoss(), outputs="logits")
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(closure\)"):
        train(tmp_path, model, optimizer)
