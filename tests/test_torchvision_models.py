"""torchvision's models train as they are: in-place activations, depthwise and dense connections."""

import pytest
import torch
import torchvision
from torch import nn

from kfac import KFAC

# image size; vgg11's first Linear sees 25,088 features whatever the image
MODELS = {"resnet18": 64, "vgg11": 32, "mobilenet_v2": 64, "densenet121": 64}


@pytest.mark.parametrize(
    ("name", "fisher"), [*((name, "mc") for name in MODELS), ("densenet121", "empirical")]
)
def test_model_takes_a_step_unmodified(name: str, fisher: str) -> None:
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    criterion = nn.CrossEntropyLoss()
    chosen = {"criterion": criterion} if fisher == "mc" else {}
    optimizer = KFAC(model, lr=1e-2, damping=0.1, max_factor_dim=512, fisher=fisher, **chosen)
    x, y = torch.randn(2, 3, MODELS[name], MODELS[name]), torch.tensor([3, 7])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    criterion(model(x), y).backward()
    optimizer.step()
    for n, p in model.named_parameters():
        assert p.isfinite().all(), n
        assert p.grad.count_nonzero() == 0 or not p.equal(before[n]), n


@pytest.mark.parametrize("name", MODELS)
def test_summary_accounts_for_every_parameter(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    optimizer = KFAC(model, lr=1e-2, damping=0.1)
    rows = optimizer.summary()
    assert sorted(row.parameter for row in rows) == sorted(n for n, _ in model.named_parameters())
