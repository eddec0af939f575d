"""The ConvNet of the MNIST example: two convolutions and two fully connected layers, 21,840 parameters.

Give it to the client as the architecture of a state dict: `--architecture convnet:ConvNet`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # what everybody calls it


class ConvNet(nn.Module):
    """Classifies digits. `x`: float32 [batch, 1, 28, 28], normalized; returns log-probabilities [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc_drop = nn.Dropout()
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = torch.flatten(x, 1)
        x = self.fc_drop(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)
