"""Causal attention over a forest of segments: one definition and the kernels that must equal it.

Shapes: N tokens, H query heads, G key heads (G divides H), E size of a head.

A backend is a function ``(query, key, value, plan, window) -> (N, H, E)``. To add one, put it into
``BACKENDS`` and into the choice of ``attend``; the tests hold every entry against ``reference``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.segments import AttentionPlan

SHORT_KEYS: Final = 512  # from here on 16-bit products pay on a CPU


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, window: int | None = None
) -> Tensor:
    """Attend with the fastest backend that the tensors allow.

    Args:
        query: (N, H, E).
        key: (N, G, E).
        value: (N, G, E).
        plan: who attends to whom.
        window: a token sees itself and the ``window - 1`` tokens before it; None for all.

    Returns:
        (N, H, E), in the dtype of ``value``; equals ``reference`` up to round-off.
    """
    on_tensor_cores = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return (varlen if on_tensor_cores else sdpa)(query, key, value, plan, window)


def reference(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, window: int | None = None
) -> Tensor:
    """Attend by the definition: a dense (N, N) mask and a softmax over all keys."""
    allowed = plan.segments.attention_mask().to(query.device)  # (N, N)
    if window is not None:
        positions = torch.from_numpy(plan.segments.positions()).to(query.device)
        allowed &= positions[:, None] - positions[None, :] < window
    heads_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(heads_per_key, dim=1)
    value = value.repeat_interleave(heads_per_key, dim=1)
    scores = torch.einsum("nhe,mhe->hnm", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)  # (H, N, N)
    return torch.einsum("hnm,mhe->nhe", weights, value)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, window: int | None = None
) -> Tensor:
    """Attend run by run with ``scaled_dot_product_attention``: any device, any dtype.

    No run is padded; on a CPU a loop over runs beats one padded call (and one call with a dense
    mask). On a CPU, 16-bit floats are computed in float32 where runs are short: its 16-bit kernel
    takes up to four times as long for them (backward, on runs of 60 to 140 keys).
    """
    is_narrow = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cpu" and is_narrow and plan.longest_keys <= SHORT_KEYS:
        with torch.autocast("cpu", enabled=False):
            wide = (query.float(), key.float(), value.float())
            return _run_by_run(*wide, plan, window).to(value.dtype)
    return _run_by_run(query, key, value, plan, window)


def _run_by_run(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, window: int | None
) -> Tensor:
    root_keys, root_values = key[: plan.root_tokens], value[: plan.root_tokens]
    branch_keys = key.index_select(0, plan.branch_keys)
    branch_values = value.index_select(0, plan.branch_keys)
    runs = zip(
        query.split(plan.root_lengths + plan.branch_lengths),
        root_keys.split(plan.root_lengths) + branch_keys.split(plan.branch_key_lengths),
        root_values.split(plan.root_lengths) + branch_values.split(plan.branch_key_lengths),
        strict=True,
    )
    return torch.cat([_causal_run(*run, window) for run in runs])


def _causal_run(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Attend from (L, H, E) queries, aligned with the last L keys, to (M, G, E) keys causally."""
    queries, keys = len(query), len(key)
    mask: Tensor | None = None
    if queries < keys or (window is not None and window < keys):
        visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = visible.tril(keys - queries)
        if window is not None:
            mask = mask.triu(keys - queries - window + 1)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[0].transpose(0, 1)  # (L, H, E)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, window: int | None = None
) -> Tensor:
    """Attend with the variable-length FlashAttention of torch: two calls, CUDA, 16-bit floats only.

    Queries of both calls are slices of the stream; only the keys of the branch runs are gathered.
    """
    n = plan.root_tokens
    outputs = [
        _flash(
            query[:n], key[:n], value[:n], plan.root_bounds, plan.root_bounds,
            max(plan.root_lengths), max(plan.root_lengths), window,
        )
    ]  # fmt: skip
    if plan.branch_lengths:
        outputs.append(
            _flash(
                query[n:],
                key.index_select(0, plan.branch_keys),
                value.index_select(0, plan.branch_keys),
                plan.branch_bounds,
                plan.branch_key_bounds,
                max(plan.branch_lengths),
                max(plan.branch_key_lengths),
                window,
            )
        )
    return torch.cat(outputs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer key heads without being told, later versions want the flag
    takes_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if takes_flag else {}
    attended = varlen_attn(
        query, key, value, query_bounds, key_bounds, longest_query, longest_key,
        window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(attended, Tensor)  # a pair only with return_aux
    return attended


Backend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, int | None], Tensor]

BACKENDS: Final[dict[str, Backend]] = {"reference": reference, "sdpa": sdpa, "varlen": varlen}
