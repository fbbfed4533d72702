"""Torch's optimizers without its compiler, whose import takes as long as that of torch itself.

``torch.optim`` keeps the compiler out of some methods by a wrapper that imports all of it on the
first call. Nothing compiles an optimizer here, so the methods inside are called by themselves.
"""

from inspect import unwrap

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that can be made and emptied of gradients without the compiler."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """Torch's AdamW."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Adafactor(EagerOptimizer, torch.optim.Adafactor):
    """Torch's Adafactor."""

    step = torch.no_grad()(unwrap(torch.optim.Adafactor.step))


class Muon(EagerOptimizer, torch.optim.Muon):
    """Torch's Muon."""

    step = torch.no_grad()(unwrap(torch.optim.Muon.step))
