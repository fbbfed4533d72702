"""A reference in memory: one that moves, or of which a loss reads the whole distributions.

It is no second module but other weights for the policy's own, of the parameters that are trained;
with adapters these are the adapters alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dpo.batching import AnswerBatch
from dpo.errors import InputError
from dpo.log_probs import Predictions, predict_answers
from dpo.policy import Policy
from dpo.swap import swapped_in


class LiveReference:
    """The weights of the reference, and a way to run them.

    Attributes:
        weights: name of each trained parameter to the reference's value, on the policy's device.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        """Take the weights of ``module`` as they are, or others of the same names and shapes.

        Raises:
            InputError: ``weights`` lacks a parameter or has it in another shape.
        """
        self._parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        given: Mapping[str, Tensor] = self._parameters if weights is None else weights
        unfit = [
            name
            for name, parameter in self._parameters.items()
            if name not in given or given[name].shape != parameter.shape
        ]
        if unfit:
            raise InputError(
                f"the reference must have the policy's architecture, as it is run in its place: "
                f"{len(unfit)} weights do not fit, the first is {unfit[0]}"
            )
        self.weights = {
            name: given[name].detach().to(parameter, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def predict(self, policy: Policy, texts: AnswerBatch) -> Predictions:
        """Return what the reference predicts at each answer token, without gradient."""
        own = self._parameters.items()
        with swapped_in((parameter, self.weights[name]) for name, parameter in own):
            predicted = predict_answers(policy, texts)
            # the parameters get the policy's weights back
            return replace(predicted, head=predicted.head.detached())

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move the reference by ``share`` of the way to the policy; 1 copies it.

        TR-DPO: Gorbatovski et al. 2024, arXiv 2404.09656, eq. 3 and 4.
        """
        for name, parameter in self._parameters.items():
            self.weights[name].lerp_(parameter, share)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of a checkpoint."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
