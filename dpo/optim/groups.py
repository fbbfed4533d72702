"""Groups of parameters, as torch.optim takes them, and their learning rates."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.policy import Policy

ParameterGroup = dict[str, Any]


def parameter_groups(
    model: nn.Module, weight_decay: float, rate_scales: Mapping[str, float] = {}
) -> list[ParameterGroup]:
    """Divide the parameters that are trained into groups of equal settings.

    Decayed are the matrices, embeddings among them, and not the biases and the gains of norms: the
    usual convention, also transformers'. A tied parameter is listed once; the order is the model's.

    Args:
        model: its parameters are meant.
        weight_decay: of those that are decayed.
        rate_scales: by parameter name, the factor on the learning rate, above 0; 1 where none is.

    Returns:
        Groups that hold, beside their ``weight_decay``, the ``lr_scale`` that
        ``set_learning_rate`` heeds, and whether the parameters are hidden matrices: of two
        dimensions, and neither an embedding nor the output head. Muon treats those in its own way.
    """
    outer = _outer_weights(model)
    groups: dict[tuple[float, ...], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        settings = {
            "weight_decay": weight_decay if parameter.dim() >= 2 else 0.0,
            "lr_scale": rate_scales.get(name, 1.0),
            "is_hidden": parameter.dim() == 2 and parameter not in outer,
        }
        group = groups.setdefault(tuple(settings.values()), {"params": [], **settings})
        group["params"].append(parameter)
    return list(groups.values())


def trained_names(model: nn.Module) -> list[str]:
    """Name the parameters that are trained, a tied one by the first of its names."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def rate_scales(names: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """Return the factor on the learning rate of each trained parameter that a pattern finds.

    Args:
        names: of the trained parameters.
        rates: factor by regular expression, which may match anywhere in a name. Of several that
            match, the first counts.

    Raises:
        InputError: a pattern finds no parameter.
    """
    scales: dict[str, float] = {}
    for pattern, scale in rates.items():
        found = [name for name in names if name not in scales and re.search(pattern, name)]
        if not found:
            raise InputError(
                f"train.rates: {pattern!r} finds no trained parameter that is not found before; "
                f"their names are of the kind {', '.join(names[:3])}; tied ones have one name"
            )
        scales |= dict.fromkeys(found, scale)
    return scales


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Change the learning rate of every group of ``optimizer``, times its ``lr_scale`` if any."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def _outer_weights(model: nn.Module) -> set[Tensor]:
    """Return the matrices at the ends of ``model``, which map tokens to vectors or back."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return embeddings | ({model.output_head().weight} if isinstance(model, Policy) else set())
