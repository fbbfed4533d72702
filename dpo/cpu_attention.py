"""Attention on a CPU, run by run, with little kept for the backward pass.

What ``scaled_dot_product_attention`` of each run would keep is the run in the dtype that it is
computed in, and its output once more beside the joined one. Here it is the stream as it is.

Shapes: N tokens, H query heads, G key heads, E size of a head, L queries and M keys of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dpo.segments import AttentionPlan, visible_keys

SHORT_KEYS: Final = 512  # from here on 16-bit products pay
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Attend with torch's kernel for CPUs; arguments and result as for ``dpo.attention.attend``.

    16-bit floats are computed in float32 where a run is short: the 16-bit kernel takes up to four
    times as long for them (backward, on runs of 60 to 140 keys).
    """
    attended: Tensor = _AttendByRuns.apply(  # type: ignore[no-untyped-call]
        query, key, value, plan, window, scale
    )
    return attended


@dataclass(frozen=True)
class _Run:
    """A run of the plan.

    Attributes:
        queries: where its L queries are in the stream.
        keys: where its M keys are: neighbours, or (M,) indexes.
        dtype: it is computed in.
        options: of the kernel; the mask (L, M) is float, 0 or -inf.
    """

    queries: slice
    keys: slice | Tensor
    dtype: torch.dtype
    options: dict[str, Any]

    def of_queries(self, stream: Tensor) -> Tensor:
        """Take (1, H, L, E) out of (N, H, E)."""
        return stream[self.queries].transpose(0, 1)[None].to(self.dtype)

    def of_keys(self, stream: Tensor) -> Tensor:
        """Take (1, G, M, E) out of (N, G, E)."""
        return stream[self.keys].transpose(0, 1)[None].to(self.dtype)


class _AttendByRuns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        normalizers = []
        for run in _runs(plan, query.dtype, window, scale):
            of_run, normalizer = _forward(
                run.of_queries(query), run.of_keys(key), run.of_keys(value), **run.options
            )
            attended[run.queries] = of_run[0].transpose(0, 1)
            normalizers.append(normalizer)
        ctx.save_for_backward(query, key, value, attended, *normalizers)
        ctx.runs = (plan, query.dtype, window, scale)
        return attended

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, *normalizers = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        by_query = torch.empty_like(query)
        by_key, by_value = (torch.zeros_like(keys, dtype=wide) for keys in (key, value))
        for run, normalizer in zip(_runs(*ctx.runs), normalizers, strict=True):
            of_query, of_key, of_value = _backward(
                run.of_queries(grads[0]),
                run.of_queries(query),
                run.of_keys(key),
                run.of_keys(value),
                run.of_queries(attended),
                normalizer,
                **{"dropout_p": 0.0, "is_causal": False} | run.options,
            )
            by_query[run.queries] = of_query[0].transpose(0, 1)
            for total, part in ((by_key, of_key), (by_value, of_value)):
                part = part[0].transpose(0, 1)  # (M, G, E)
                if isinstance(run.keys, slice):
                    total[run.keys] = part  # root runs share no keys, and come first
                else:
                    total.index_add_(0, run.keys, part.to(wide))
        return by_query, by_key.to(key.dtype), by_value.to(value.dtype), None, None, None


def _runs(
    plan: AttentionPlan, dtype: torch.dtype, window: int | None, scale: float | None
) -> Iterator[_Run]:
    """Yield the runs in the order of their queries: root runs, then branch runs."""
    branch_keys = plan.branch_keys.split(plan.branch_key_lengths)
    lengths = plan.root_lengths + plan.branch_lengths
    start = 0
    for length, gathered in zip(lengths, (*plan.root_lengths, *branch_keys), strict=True):
        queries = slice(start, start + length)
        keys = queries if isinstance(gathered, int) else gathered
        count = length if isinstance(gathered, int) else len(gathered)
        wide = torch.promote_types(dtype, torch.float32)
        computed = wide if count <= SHORT_KEYS else dtype
        options: dict[str, Any] = {"scale": scale}
        if (visible := visible_keys(length, count, window)) is None:
            options["is_causal"] = True
        else:
            mask = torch.zeros(length, count, dtype=computed)
            options["attn_mask"] = mask.masked_fill_(~visible, -torch.inf)
        yield _Run(queries, keys, computed, options)
        start += length
