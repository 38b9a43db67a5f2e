import pytest
import torch
from torch import nn

from cifar.models import MODELS, build_model
from cifar.settings import ModelName, ModelSettings


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", 269_722), ("resnet18", 11_173_962), ("vgg11", 9_225_610)],
)
def test_models_have_their_known_size_and_classify_small_images(
    name: ModelName, parameters: int
) -> None:
    model = build_model(ModelSettings(name=name), num_classes=10).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_vgg11_has_no_normalisation() -> None:
    kinds = {type(module) for module in MODELS["vgg11"](10).modules()}
    assert nn.BatchNorm2d not in kinds


def test_the_same_seed_gives_the_same_weights() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(MODELS["resnet20"](10))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_resnet20_trains_with_its_in_place_relus() -> None:
    model = MODELS["resnet20"](10)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
