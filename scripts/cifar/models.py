"""Networks for 3×32×32 images, all with in-place ReLU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18 as imagenet_resnet18

from cifar.settings import ModelName, ModelSettings


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A of the paper)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out)) + self.shortcut(x)
        out = self.relu(out)
        return out

    def shortcut(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


def resnet20(num_classes: int) -> nn.Sequential:
    """ResNet-20 with 0.27 million parameters: He et al. 2016, section 4.2, n = 3."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
    ]
    channels_in = 16
    for channels in (16, 32, 64):
        for _ in range(3):
            layers.append(BasicBlock(channels_in, channels, channels // channels_in))
            channels_in = channels
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)
    )
    return initialise(model)


def resnet18(num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images: 3×3 convolution, no pooling."""
    model: nn.Module = imagenet_resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vgg11(num_classes: int) -> nn.Sequential:
    """VGG-11 without normalisation (Simonyan & Zisserman 2015, A), with one linear layer on top."""
    layers: list[nn.Module] = []
    channels_in = 3
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for channels in stage:
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU(inplace=True)]
            channels_in = channels
        layers.append(nn.MaxPool2d(2))
    return initialise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, num_classes)))


def initialise(model: nn.Sequential) -> nn.Sequential:
    """Convolution weights from N(0, 2 / fan out), biases zero: He et al. 2015."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


MODELS: dict[ModelName, Callable[[int], nn.Module]] = {
    "resnet20": resnet20,
    "resnet18": resnet18,
    "vgg11": vgg11,
}


def build_model(settings: ModelSettings, num_classes: int) -> nn.Module:
    model = MODELS[settings.name](num_classes)
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model
