"""Causal attention over a forest of segments: one definition and the kernels that must equal it.

Shapes: N tokens, H query heads, G key heads (G divides H), E size of a head, B rows, L queries and
M keys of a run or row.

A backend is a function ``(query, key, value, plan, options) -> (N, H, E)``. To add one, put it into
``BACKENDS`` and into the choice of ``attend``; the tests hold every entry against ``reference``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.cpu_attention import attend_by_runs
from dpo.segments import AttentionPlan, visible_keys


@dataclass(frozen=True)
class AttentionOptions:
    """What differs from one layer to another.

    Attributes:
        window: a token sees itself and the ``window - 1`` tokens before it; None for all.
        scale: factor on the products of queries and keys; None for ``E ** -0.5``.
        softcap: bounds the scaled products by ``c * tanh(x / c)`` (Gemma 2, arXiv 2408.00118); None
            for no bound.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


PLAIN: Final = AttentionOptions()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attend with the fastest backend that the tensors allow.

    Args:
        query: (N, H, E).
        key: (N, G, E).
        value: (N, G, E).
        plan: who attends to whom.
        options: of the layer. No fast kernel has a softcap: it is computed by the definition, run
            by run, and keeps the (H, L, M) products of each run for the backward pass.

    Returns:
        (N, H, E), in the dtype of ``value``; equals ``reference`` up to round-off.
    """
    on_tensor_cores = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    backend = varlen if on_tensor_cores and options.softcap is None else sdpa
    return backend(query, key, value, plan, options)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attend by the definition: a dense (N, N) mask and a softmax over all keys."""
    allowed = plan.segments.attention_mask().to(query.device)  # (N, N)
    if options.window is not None:
        positions = torch.from_numpy(plan.segments.positions()).to(query.device)
        allowed &= positions[:, None] - positions[None, :] < options.window
    heads_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(heads_per_key, dim=1)
    value = value.repeat_interleave(heads_per_key, dim=1)
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    scores = torch.einsum("nhe,mhe->hnm", query, key) * scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)  # (H, N, N)
    return torch.einsum("hnm,mhe->nhe", weights, value)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attend run by run with ``scaled_dot_product_attention``: any device, any dtype.

    No run is padded; on a CPU a loop over runs beats one padded call (and one call with a dense
    mask).
    """
    if query.device.type == "cpu" and options.softcap is None:
        return attend_by_runs(query, key, value, plan, window=options.window, scale=options.scale)
    return _run_by_run(query, key, value, plan, options)


def _run_by_run(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, options: AttentionOptions
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
    return torch.cat([_causal_run(*run, options) for run in runs])


def _causal_run(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Attend from (L, H, E) queries, aligned with the last L keys, to (M, G, E) keys causally."""
    visible = visible_keys(len(query), len(key), options.window, query.device)
    attended = attend_dense(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        visible,
        options,
    )
    return attended[0].transpose(0, 1)  # (L, H, E)


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attend in rows of equal length; of ``options``, the window is not heeded.

    Args:
        query: (B, H, L, E).
        key: (B, G, M, E).
        value: (B, G, M, E).
        visible: bool, broadcast to (B, H, L, M): does the query see the key? None where L equals M
            and each query sees its own key and those before it.
        options: of the layer.

    Returns:
        (B, H, L, E), in the dtype of ``value``.
    """
    if options.softcap is not None:
        return _softcapped(query, key, value, visible, options.scale, options.softcap)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        is_causal=visible is None,
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """Attend as ``attend_dense`` by the definition, everything after the products in float32."""
    if visible is None:
        size = query.shape[-2]
        visible = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    heads_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(heads_per_key, dim=1)  # (B, H, M, E)
    value = value.repeat_interleave(heads_per_key, dim=1)
    products = query @ key.transpose(-1, -2)  # (B, H, L, M)
    wide = products.to(torch.promote_types(products.dtype, torch.float32))
    factor = (query.shape[-1] ** -0.5 if scale is None else scale) / softcap
    scores = softcap * torch.tanh(wide * factor)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return weights.to(value.dtype) @ value


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attend with the variable-length FlashAttention of torch: two calls, CUDA, 16-bit floats only.

    Queries of both calls are slices of the stream; only the keys of the branch runs are gathered.

    Raises:
        NotImplementedError: the options have a softcap, which the kernel lacks.
    """
    if options.softcap is not None:
        raise NotImplementedError("varlen_attn has no softcap")
    n = plan.root_tokens
    outputs = [
        _flash(
            query[:n], key[:n], value[:n], plan.root_bounds, plan.root_bounds,
            max(plan.root_lengths), max(plan.root_lengths), options,
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
                options,
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
    options: AttentionOptions,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer key heads without being told, later versions want the flag
    takes_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if takes_flag else {}
    attended = varlen_attn(
        query, key, value, query_bounds, key_bounds, longest_query, longest_key,
        window_size=(-1 if options.window is None else options.window - 1, 0),
        scale=options.scale, **grouped,
    )  # fmt: skip
    assert isinstance(attended, Tensor)  # a pair only with return_aux
    return attended


Backend = Callable[[Tensor, Tensor, Tensor, AttentionPlan, AttentionOptions], Tensor]

BACKENDS: Final[dict[str, Backend]] = {"reference": reference, "sdpa": sdpa, "varlen": varlen}
