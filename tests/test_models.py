"""Models as their libraries build them train as they are: nearly all weights are under K-FAC.

The full-sized ones are built on the "meta" device where nothing is computed; the ones that train
are the same classes, narrower and shallower, without dropout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig

from kfac import KFAC
from kfac.inverse import Cholesky

TORCHVISION = (
    "convnext_tiny", "densenet121", "efficientnet_b0", "mobilenet_v2", "resnet18", "swin_t",
    "vgg11", "vit_b_16",
)  # fmt: skip
FULL_SIZED: dict[str, Callable[[], nn.Module]] = {
    **{name: getattr(models, name) for name in TORCHVISION},
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig()),
    "timm resnet10t": lambda: timm.create_model("resnet10t"),
    "timm vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224"),
}

CLASSES, IMAGES, SIZE = 10, 16, 32
VOCABULARY, SENTENCES, LENGTH, TOKEN_WIDTH = 211, 8, 16, 32


def vision_transformer() -> nn.Module:
    return models.VisionTransformer(
        image_size=SIZE, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=CLASSES,
    )  # fmt: skip


def swin_transformer() -> nn.Module:
    return models.SwinTransformer(
        patch_size=[2, 2], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4],
        stochastic_depth_prob=0.0, num_classes=CLASSES,
    )  # fmt: skip


def convnext() -> nn.Module:
    stages = [CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)]
    # 1e-6, the default, makes every block an identity for the first hundreds of steps.
    return models.ConvNeXt(stages, layer_scale=1.0, num_classes=CLASSES)


def efficientnet() -> nn.Module:
    shapes = [(1, 3, 1, 16, 16, 1), (6, 3, 2, 16, 24, 1), (6, 5, 2, 24, 40, 2)]
    stages = [MBConvConfig(*shape, width_mult=1.0, depth_mult=1.0) for shape in shapes]
    return models.EfficientNet(
        stages, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=128
    )


def timm_vision_transformer() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, depth=2, embed_dim=64, num_heads=4,
        num_classes=CLASSES,
    )  # fmt: skip


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=TOKEN_WIDTH, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=TOKEN_WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def images() -> tuple[Tensor, Tensor]:
    """Smooth pictures in [0, 1] with some noise: neighbouring pixels are alike."""
    coarse = F.interpolate(torch.randn(IMAGES, 3, 4, 4), size=SIZE, mode="bilinear")
    noise = 0.1 * torch.randn(IMAGES, 3, SIZE, SIZE)
    return (coarse + noise).sigmoid(), torch.randint(0, CLASSES, (IMAGES,))


def sentences() -> tuple[Tensor, Tensor]:
    """Tokens, and what is to be said of each."""
    shape = (SENTENCES, LENGTH)
    return torch.randint(0, VOCABULARY, shape), torch.randint(0, VOCABULARY, shape)


Loss = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]  # of model, criterion, batch


def of_logits(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion(model(x), y)


def of_each_token(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion(model(input_ids=x).logits.flatten(0, 1), y.flatten())


def of_next_token(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def own_of_each_token(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(input_ids=x, labels=y).loss


def own_of_next_token(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def empirical(shift: int) -> dict[str, Any]:
    """Settings for a model that computes its own loss, the mean over the tokens that have one."""
    return {"criterion": None, "loss_terms": lambda labels, **_: labels[:, shift:].numel()}


Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Loss, dict[str, Any]]
CASES: dict[str, Case] = {
    "vit": (vision_transformer, images, of_logits, {}),
    "swin": (swin_transformer, images, of_logits, {}),
    "convnext": (convnext, images, of_logits, {}),
    "efficientnet": (efficientnet, images, of_logits, {}),
    "timm vit": (timm_vision_transformer, images, of_logits, {}),
    "gpt2": (gpt2, sentences, of_next_token, {}),
    "gpt2, own loss": (gpt2, sentences, own_of_next_token, empirical(1)),
    "bert": (bert, sentences, of_each_token, {}),
    "bert, own loss": (bert, sentences, own_of_each_token, empirical(0)),
}


def built(name: str) -> tuple[nn.Module, nn.Module, Callable[[], Tensor], dict[str, Any]]:
    """The model, its criterion, its loss on one fixed batch, and settings for K-FAC."""
    build, data, loss, settings = CASES[name]
    torch.manual_seed(0)
    criterion = nn.CrossEntropyLoss()
    batch = data()
    model = build().train()
    return model, criterion, partial(loss, model, criterion, *batch), settings


def loss_after(closure: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float:
    for _ in range(20):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    return closure().item()


def assert_moves(model: nn.Module, optimizer: KFAC, closure: Callable[[], Tensor]) -> None:
    """A step moves every parameter that is under K-FAC and has a gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    closure().backward()
    optimizer.step()
    treatments = {row.parameter: row.treatment for row in optimizer.summary()}
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if treatments[name] == "kfac" and parameter.grad.count_nonzero() > 0:
            assert not parameter.equal(before[name]), name


@pytest.mark.parametrize("name", FULL_SIZED)
def test_nearly_all_parameters_are_under_kfac(name: str) -> None:
    with torch.device("meta"):
        model = FULL_SIZED[name]()
    summary = KFAC(model, lr=0.1).summary()
    assert sorted(row.parameter for row in summary) == sorted(
        n for n, _ in model.named_parameters()
    )
    assert summary.fraction("kfac") >= 0.95
    assert all(row.reason for row in summary if row.treatment != "kfac")


@pytest.mark.parametrize("name", CASES)
def test_a_step_moves_what_is_under_kfac(name: str) -> None:
    model, criterion, closure, settings = built(name)
    optimizer = KFAC(model, lr=0.1, damping=0.03, **{"criterion": criterion, **settings})
    assert optimizer.summary().fraction("kfac") >= 0.95
    assert_moves(model, optimizer, closure)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_a_step_moves_full_sized_convolution_nets(name: str, fisher: Any) -> None:
    """In-place activations, depthwise convolutions, dense connections."""
    model, criterion = getattr(models, name)(num_classes=CLASSES), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=1.0, damping=0.1, kl_clip=None, max_factor_dim=512, fisher=fisher,
        criterion=criterion,
    )  # fmt: skip
    batch = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    assert_moves(model, optimizer, partial(of_logits, model, criterion, *batch))


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_on_a_batch_beat_sgd_at_its_best_learning_rate(name: str) -> None:
    model, criterion, closure, settings = built(name)
    start = closure().item()
    optimizer = KFAC(
        model, lr=0.1, damping=0.03, factor_update_period=1, inverse_update_period=1,
        max_factor_dim=512, **{"criterion": criterion, **settings},
    )  # fmt: skip
    found = loss_after(closure, optimizer)
    others = {}
    for lr in (0.01, 0.03, 0.1):
        model, _, closure, _ = built(name)
        assert closure().item() == pytest.approx(start)
        others[lr] = loss_after(closure, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))
    assert found < 0.9 * min(others.values()), others


def test_the_plain_gradient_does_not_beat_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: the directions are the gradients themselves."""
    plain = lambda self, state, gradient, damping: gradient.clone()  # noqa: E731
    monkeypatch.setattr(Cholesky, "precondition", plain)
    for name in ("timm vit", "gpt2"):
        with pytest.raises(AssertionError):
            test_twenty_steps_on_a_batch_beat_sgd_at_its_best_learning_rate(name)
