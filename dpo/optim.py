"""The optimizers, gradient clipping and the learning-rate schedules.

To add an optimizer: a function as those of ``OPTIMIZERS``, a line there and its name in
``dpo.train_config.Optimizer``.

A schedule maps an update's number ``step`` (from 0), the updates in the ``warmup`` and those in the
``total`` of the run to a factor on the learning rate. All rise linearly from 0 over the warm-up.

To add a schedule: a function of those three and a line in ``SCHEDULES``, by which tests go.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

Schedule = Callable[[int, int, int], float]
ParameterGroup = dict[str, Any]  # as torch.optim takes it

FUSED_DEVICES: Final = frozenset({"cpu", "cuda", "mps", "xpu"})


def parameter_groups(
    model: nn.Module, weight_decay: float, rate_scales: Mapping[str, float] | None = None
) -> list[ParameterGroup]:
    """Divide the parameters that are trained by their weight decay and learning rate.

    Decayed are the matrices, embeddings among them, and not the biases and the gains of norms: the
    usual convention, also transformers'. A tied parameter is listed once; the order is the model's.

    Args:
        model: whose parameters are trained where they require a gradient.
        weight_decay: of the matrices.
        rate_scales: factors on the learning rate by parameter name, 1 where there is none; kept as
            ``lr_scale`` of a group.
    """
    scales = rate_scales or {}
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = parameter.dim() < 2, scales.get(name, 1.0)
            members.setdefault(kind, []).append(parameter)
    return [
        {
            "params": members[kind],
            "weight_decay": 0.0 if kind[0] else weight_decay,
            "lr_scale": kind[1],
        }
        for kind in sorted(members)
    ]


def adamw(
    groups: Sequence[ParameterGroup],
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """Make an AdamW over ``groups``, in one fused kernel on the devices that have one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=(beta1, beta2),
        eps=epsilon,
        fused=devices <= FUSED_DEVICES,
    )


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum: Chen et al. 2023 (arXiv 2302.06675), program 1.

    One state in place of AdamW's two; wants a learning rate some 3 to 10 times smaller.
    """

    def __init__(
        self,
        params: Sequence[ParameterGroup],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, gradient = state["momentum"], parameter.grad
                direction = torch.lerp(gradient, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - beta2)


def adafactor(groups: Sequence[ParameterGroup], *, learning_rate: float) -> torch.optim.Optimizer:
    """Make torch's Adafactor: factored squares, no mean (Shazeer and Stern 2018, arXiv 1804.04235).

    A step is the learning rate, at most 1 / sqrt(step), times the size of the parameter.
    """
    return torch.optim.Adafactor(groups, lr=learning_rate)


def lion(
    groups: Sequence[ParameterGroup], *, learning_rate: float, beta1: float, beta2: float
) -> torch.optim.Optimizer:
    """Make a `Lion`."""
    return Lion(groups, learning_rate, (beta1, beta2))


OPTIMIZERS: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
}


def make_optimizer(
    name: str, groups: Sequence[ParameterGroup], *, learning_rate: float, **options: float | None
) -> torch.optim.Optimizer:
    """Make an optimizer of a name in ``OPTIMIZERS``; options that are None are left out."""
    given = {key: value for key, value in options.items() if value is not None}
    return OPTIMIZERS[name](groups, learning_rate=learning_rate, **given)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Change the learning rate of every group of ``optimizer``, times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients in place so that their joint L2 norm is at most ``max_norm``.

    Never waits for the device. A norm that is not finite spoils the gradients: the caller looks at
    it before the update.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: None leaves the gradients as they are.

    Returns:
        The norm before clipping: a scalar, float32 at least.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    # The public get_total_norm would round the norm of bfloat16 gradients to three digits.
    norms = torch._foreach_norm(gradients, 2, dtype)  # pyright: ignore[reportPrivateImportUsage]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def linear(step: int, warmup: int, total: int) -> float:
    """Fall linearly to 0 at ``total``."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, warmup: int, total: int) -> float:
    """Fall along half a cosine to 0 at ``total``."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def constant(step: int, warmup: int, total: int) -> float:
    """Stay at 1."""
    return min(1.0, step / warmup) if warmup else 1.0


def warmup_stable_decay(step: int, warmup: int, total: int, *, decay_share: float = 0.2) -> float:
    """Stay at 1, then fall linearly to 0 over the last ``decay_share`` of the updates.

    Hu et al., arXiv:2404.06395; a fifth is the share that Hägele et al., arXiv:2405.18392, use.
    """
    if step < warmup:
        return step / warmup
    decay_start = max(warmup, total - round(decay_share * total))
    return min(1.0, max(0.0, (total - step) / max(1, total - decay_start)))


SCHEDULES: Final[dict[str, Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
    "wsd": warmup_stable_decay,
}


def make_schedule(name: str, *, decay_share: float | None = None) -> Schedule:
    """Return the schedule of a name in ``SCHEDULES``, wsd with its ``decay_share`` if given."""
    if decay_share is None:
        return SCHEDULES[name]
    assert name == "wsd", f"{name} has no decay_share"
    return partial(warmup_stable_decay, decay_share=decay_share)
