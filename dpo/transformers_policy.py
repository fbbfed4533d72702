"""A transformers model as a policy: for embedding, where the model is not one of ours.

The stream is unfolded into one padded row per answer, so nothing is shared and padding is computed:
correct for any causal model, but slower than ``dpo.models``.

Shapes: N tokens, B rows (one per path from a root to a leaf), L longest row, D hidden size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo.errors import InputError
from dpo.policy import OutputHead
from dpo.segments import Segments, TokenStream


class CausalLM(Protocol):
    """The part of ``transformers.PreTrainedModel`` that is used."""

    base_model: nn.Module

    def get_output_embeddings(self) -> Any:
        """Return the linear layer that makes logits."""
        ...


class TransformersPolicy(nn.Module):
    """Wraps a ``transformers`` causal language model; trains it in place.

    Example::

        model = AutoModelForCausalLM.from_pretrained("gpt2")
        Trainer(TransformersPolicy(model), pairs).train()
        model.save_pretrained("out")
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model``.

        Raises:
            InputError: it does more to its logits than one linear layer, or has no such layer.
        """
        super().__init__()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Linear):
            raise InputError(f"{type(model).__name__} has no linear output layer")
        config = getattr(model, "config", None)
        for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(config, option, None) not in (None, 1, 1.0):
                raise InputError(f"{type(model).__name__} changes its logits by {option}")
        self.model = model
        self._head = [head]  # in a list: it is a part of model already

    def output_head(self) -> OutputHead:
        """Return the model's output layer."""
        return OutputHead(self._head[0].weight, self._head[0].bias)

    def forward(self, stream: TokenStream) -> Tensor:
        """Return (N, D) hidden states."""
        rows, columns, index = _unfold(stream.plan.segments)
        device = stream.input_ids.device
        index = index.to(device)  # (B, L) stream index of each cell, -1 where padded
        mask = (index >= 0).long()
        output = self.model.base_model(  # type: ignore[operator]
            input_ids=stream.input_ids[index.clamp(min=0)] * mask, attention_mask=mask
        )
        hidden: Tensor = output.last_hidden_state  # (B, L, D)
        return hidden[rows.to(device), columns.to(device)]


def _unfold(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Lay every path from a root to a leaf into a row.

    Returns:
        The (N,) row and (N,) column where each token of the stream is found first, and the (B, L)
        stream indexes of the rows, padded with -1.
    """
    inner = {parent for parent in segments.parents if parent is not None}
    leaves = [segment for segment in range(len(segments.lengths)) if segment not in inner]
    paths = [torch.from_numpy(segments.tokens(segments.path(leaf))) for leaf in leaves]
    index = nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1)  # (B, L)
    rows = torch.empty(sum(segments.lengths), dtype=torch.int64)
    columns = torch.empty_like(rows)
    for row, path in reversed(list(enumerate(paths))):
        rows[path], columns[path] = row, torch.arange(len(path))
    return rows, columns, index
