"""MLPs of many experts, of which each token takes a few.

Shapes: N tokens, D hidden size, X experts, C experts that a token takes, I hidden size of an
expert, M tokens in the order of experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.models.activations import ACTIVATIONS
from dpo.models.architectures import Experts
from dpo.models.config import ModelConfig
from dpo.models.gating import gated
from dpo.models.linear import Linear


class SparseMLP(nn.Module):
    """A gated MLP out of many for each token (Shazeer et al. 2017, arXiv 1701.06538).

    Only the experts that a token takes are computed for it. The router is that of Mixtral
    (Jiang et al. 2024, arXiv 2401.04088, section 2.1): softmax over all experts, then the largest.
    """

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.chosen, self.shares_sum_to_one = experts.chosen, experts.shares_sum_to_one
        self.gate = Linear(config.hidden_size, experts.count, bias=False)
        self.experts = ExpertMLPs(config, experts)
        self.records = False  # whether a forward pass leaves (N, X) shares and (N, C) choices
        self.record: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, D) to (N, D)."""
        shares, chosen = self.route(hidden)  # (N, C)
        by_expert = chosen.flatten().argsort(stable=True)  # (N C,): token C + choice
        counts = chosen.flatten().bincount(minlength=self.gate.out_features)  # (X,)
        grouped = hidden[by_expert // self.chosen]  # (N C, D)
        outputs = self.experts(grouped, counts)[by_expert.argsort()]  # (N C, D): token by token
        weighted: Tensor = outputs.view(*chosen.shape, -1) * shares[:, :, None]  # (N, C, D)
        return weighted.sum(dim=1).to(hidden.dtype)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares of the experts that each token takes, and their numbers, both (N, C).

        Shares are float32, or float64 of a float64 model.
        """
        logits = self.gate(hidden)  # (N, X)
        shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
        largest, chosen = shares.topk(self.chosen, dim=1)
        if self.records:
            self.record = shares, chosen
        if self.shares_sum_to_one:
            largest = largest / largest.sum(dim=1, keepdim=True)
        return largest, chosen


class ExpertMLPs(nn.Module):
    """The gated MLPs of all experts, as one tensor for each kind of matrix."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        count, size, inner = experts.count, config.hidden_size, experts.size
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Parameter(torch.empty(count, inner, size))
        self.up_proj = nn.Parameter(torch.empty(count, inner, size))
        self.down_proj = nn.Parameter(torch.empty(count, size, inner))

    def forward(self, grouped: Tensor, counts: Tensor) -> Tensor:
        """Map (M, D) tokens, those of one expert after another, to (M, D).

        Args:
            grouped: (M, D).
            counts: (X,) int64 tokens of each expert; the host waits for them.
        """
        groups = grouped.split(counts.tolist())
        # unbind: its gradient is one stack, that of an index a whole tensor for each expert
        matrices = zip(
            self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True
        )
        outputs = []
        for group, (gate, up, down) in zip(groups, matrices, strict=True):
            inner = gated(F.linear(group, gate), F.linear(group, up), self.activation)
            outputs.append(F.linear(inner, down))
        return torch.cat(outputs)
