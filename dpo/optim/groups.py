"""Groups of parameters, as torch.optim takes them, and their learning rates."""

from typing import Any

import torch
from torch import nn

ParameterGroup = dict[str, Any]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Divide the parameters that are trained into those with weight decay and those without.

    Decayed are the matrices, embeddings among them, and not the biases and the gains of norms: the
    usual convention, also transformers'. A tied parameter is listed once; the order is the model's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Change the learning rate of every group of ``optimizer``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
