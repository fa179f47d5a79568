"""ResNet-18 and VGG-16, with the parameters of the published models."""

import itertools

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a short cut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def resnet18(classes: int) -> nn.Module:
    """ResNet-18 on (b, 3, side, side); 11 689 512 parameters at 1000 classes."""
    widths = (64, 128, 256, 512)
    blocks = [BasicBlock(64, 64, 1), BasicBlock(64, 64, 1)]
    for inputs, outputs in itertools.pairwise(widths):
        blocks += [BasicBlock(inputs, outputs, 2), BasicBlock(outputs, outputs, 1)]
    return nn.Sequential(
        _convolution(3, 64, 7, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, classes),
    )


def vgg16(classes: int) -> nn.Module:
    """VGG-16 without normalisation on (b, 3, side, side) (ICLR 2015); 138 357 544 parameters at
    1000 classes."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, repeated in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeated):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    dense = (
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(),
    )
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *dense, nn.Linear(4096, classes)
    )
