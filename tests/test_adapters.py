"""Adapters in memory: the mathematics of a layer, of the output projection, and of merging."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.adapter_config import AdapterConfig
from dpo.adapters import (
    AdaptedLinear,
    Adapter,
    adapted_layers,
    add_adapter,
    find_targets,
    merge_adapter,
    rate_scales,
)
from dpo.batching import collate
from dpo.errors import InputError
from dpo.log_probs import completion_log_probs
from dpo.models import Decoder, load_model, save_model
from dpo.models.transforms import compile_blocks, recompute
from dpo.optim import make_optimizer, parameter_groups, set_learning_rate
from dpo.quantization import SCHEMES, QuantizedLinear, quantize_linears
from dpo.tokenization import TokenizedPairs
from dpo.train_config import Dtype, TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

ADAPTERS = {
    "lora": Adapter(3, 6.0),
    "rslora": Adapter(3, 6.0, is_rslora=True),
    "dora": Adapter(3, 6.0, is_dora=True),
}
BASES = ["none", *SCHEMES]


def stir(model: nn.Module) -> None:
    """Give updates that count: B away from zero, magnitudes away from the lengths of W."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.up.normal_(0, 0.3, generator=generator)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + torch.rand(len(layer.magnitude), generator=generator))


def adapted(
    make_model: MakeModel, adapter: Adapter, *, targets: str | None = None, **changes: object
) -> Decoder:
    """A tiny model with updates that count."""
    model = make_model(**changes)
    add_adapter(model, adapter, targets=targets)
    stir(model)
    return model


def layer_of(adapter: Adapter, base: str, *, bias: bool = True) -> AdaptedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(8, 5, bias=bias, dtype=torch.float64)
    model = nn.Sequential(linear if base == "none" else QuantizedLinear(linear, base))
    add_adapter(model, adapter)
    stir(model)
    layer = model[0]
    assert isinstance(layer, AdaptedLinear)
    return layer


def log_probs(model: Decoder, pairs: TokenizedPairs) -> Tensor:
    return completion_log_probs(model, collate(list(pairs)).texts).log_probs


# --- one layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_equals_the_linear_layer_of_its_merged_weight(
    adapter: Adapter, base: str, bias: bool
) -> None:
    layer = layer_of(adapter, base, bias=bias)
    hidden = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, 5, dtype=torch.float64)
    trained = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    found = layer(hidden)
    expected = F.linear(hidden, layer.merged_weight(), layer.base.bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, trained, grad), torch.autograd.grad(expected, trained, grad)
    )


def test_merged_weight_is_that_of_the_papers() -> None:
    layer = layer_of(Adapter(4, 6.0, is_rslora=True), "none")
    update = layer.up @ layer.down
    torch.testing.assert_close(layer.merged_weight(), layer.weight + 6 / 2 * update)
    layer = layer_of(Adapter(4, 6.0, is_dora=True), "none")
    total = layer.weight + 6 / 4 * layer.up @ layer.down
    assert layer.magnitude is not None
    lengths = layer.merged_weight().square().sum(dim=1).sqrt()
    torch.testing.assert_close(lengths, layer.magnitude)
    torch.testing.assert_close(
        F.cosine_similarity(layer.merged_weight(), total), torch.ones(5, dtype=torch.float64)
    )


def test_magnitudes_start_at_the_lengths_of_the_rows() -> None:
    linear = nn.Linear(8, 5, bias=False)
    model, weight = nn.Sequential(linear), linear.weight
    add_adapter(model, Adapter(2, is_dora=True))
    magnitude = adapted_layers(model)["0"].magnitude
    assert magnitude is not None
    torch.testing.assert_close(magnitude, torch.linalg.vector_norm(weight, dim=1))


def test_lengths_of_dora_have_no_gradient() -> None:
    """With a constant c = m / |V| the gradient by B of sum(g * c * s * x A^T B^T) is linear."""
    layer = layer_of(Adapter(2, 6.0, is_dora=True), "none", bias=False)
    assert layer.magnitude is not None
    hidden, grad = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    total = layer.weight + 3 * layer.up @ layer.down
    ratio = (layer.magnitude / total.norm(dim=1)).detach()
    (found,) = torch.autograd.grad(layer(hidden), layer.up, grad)
    torch.testing.assert_close(found, 3 * (ratio * grad).T @ (hidden @ layer.down.T))


# --- a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_new_adapter_changes_nothing_bit_for_bit(
    make_model: MakeModel, make_pairs: MakePairs, adapter: Adapter, base: str, dtype: torch.dtype
) -> None:
    model = make_model(attention_bias=True, tie_word_embeddings=False, dtype=dtype)
    if base != "none":
        quantize_linears(model, base)
    before = log_probs(model, make_pairs())
    add_adapter(model, adapter)
    assert torch.equal(log_probs(model, make_pairs()), before)


def test_updates_alone_are_trained_and_drawn_by_the_seed(make_model: MakeModel) -> None:
    first, again, other = (make_model(dtype=torch.bfloat16) for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        add_adapter(model, Adapter(3), seed=seed)
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert trained == {
        f"{name}.{part}" for name in adapted_layers(first) for part in ("down", "up")
    }
    name = "model.layers.1.mlp.down_proj.down"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    drawn = first.get_parameter(name)
    assert drawn.dtype == torch.float32
    assert float(drawn.abs().max().detach()) <= 24**-0.5
    assert float(drawn.detach().std()) == pytest.approx(24**-0.5 / math.sqrt(3), rel=0.2)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_update_of_the_output_equals_the_merged_output(
    make_model: MakeModel, make_pairs: MakePairs, adapter: Adapter, ties: bool
) -> None:
    options = {"dtype": torch.float64, "tie_word_embeddings": ties}
    model = adapted(make_model, adapter, targets="lm_head,q_proj", **options)
    layer = adapted_layers(model)["lm_head"]
    trained = [p for p in model.parameters() if p.requires_grad]
    found = log_probs(model, make_pairs())
    texts = collate(list(make_pairs())).texts
    logits = F.linear(model(texts.stream)[texts.predictors], layer.merged_weight())
    expected = logits.log_softmax(dim=1).gather(1, texts.targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), trained), torch.autograd.grad(expected.sum(), trained)
    )


def test_update_of_the_output_stays_in_its_factors(make_model: MakeModel) -> None:
    model = make_model()
    weight = model.lm_head.weight
    add_adapter(model, Adapter(3), targets="lm_head")
    head = model.output_head()
    assert head.weight is weight
    assert head.update is not None
    assert head.update.up is model.get_parameter("lm_head.up")


def test_copy_of_an_adapted_model_has_an_output_of_its_own(make_model: MakeModel) -> None:
    model = adapted(make_model, Adapter(3), targets="lm_head")
    other = copy.deepcopy(model)
    update = other.output_head().update
    assert update is not None
    assert update.up is other.get_parameter("lm_head.up")
    assert update.up is not model.get_parameter("lm_head.up")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("targets", [None, "lm_head,v_proj"])
@pytest.mark.parametrize(("ties", "is_dora"), [(True, False), (False, False), (True, True)])
def test_merged_model_equals_the_adapted_one_also_from_disk(
    make_model: MakeModel,
    make_pairs: MakePairs,
    tmp_path: Path,
    base: str,
    targets: str | None,
    ties: bool,
    is_dora: bool,
) -> None:
    model = make_model(attention_bias=True, tie_word_embeddings=ties, dtype=torch.float64)
    if base != "none":
        quantize_linears(model, base)
    add_adapter(model, Adapter(3, is_dora=is_dora), targets=targets)
    stir(model)
    expected = log_probs(model, make_pairs())
    merge_adapter(model)
    assert {type(module) for module in model.modules()}.isdisjoint({AdaptedLinear, QuantizedLinear})
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(log_probs(model, make_pairs()), expected)
    save_model(model, tmp_path)
    read = load_model(tmp_path, dtype=torch.float64)
    assert torch.equal(log_probs(read, make_pairs()), log_probs(model, make_pairs()))
    assert read.config.ties_embeddings == (ties and targets is None)


# --- training -----------------------------------------------------------------------------------


def leave(_model: Decoder) -> None:
    """Transform nothing."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bf16-mixed"])
@pytest.mark.parametrize("base", BASES)
def test_trainer_trains_an_adapter_and_leaves_the_base(
    make_model: MakeModel, make_pairs: MakePairs, base: str, dtype: Dtype
) -> None:
    numbers = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = make_model(dtype=numbers, tie_word_embeddings=False)
    if base != "none":
        quantize_linears(model, base)
    add_adapter(model, Adapter(4, is_dora=True), targets=r".*(proj|lm_head)")
    frozen = {n: t.clone() for n, t in model.state_dict().items() if ".base." in n}
    config = TrainConfig(
        batch_size=8, steps=4, learning_rate=1e-2, schedule="constant", dtype=dtype
    )
    trainer = Trainer(model, make_pairs(), config)
    losses = [step.metrics["loss"] for step in trainer if step.metrics is not None]
    assert losses[0] == pytest.approx(math.log(2), abs=0.02 if dtype != "float32" else 1e-6)
    assert losses[-1] < losses[0] - 0.02
    assert frozen
    for name, tensor in frozen.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert trainer.tensors()["model"].keys() == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("base", BASES)
def test_parts_that_are_computed_again_give_bit_equal_gradients(
    make_model: MakeModel, make_pairs: MakePairs, base: str
) -> None:
    gradients = []
    for transform in (leave, partial(recompute, part="mlp"), partial(recompute, part="layer")):
        model = make_model()
        if base != "none":
            quantize_linears(model, base)
        add_adapter(model, Adapter(3, is_dora=True))
        stir(model)
        transform(model)
        log_probs(model, make_pairs()).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients[1:], gradients[:1] * 2, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), [("lora", "none"), ("dora", "nf4")])
def test_compiled_blocks_equal_eager_ones(
    make_model: MakeModel, make_pairs: MakePairs, name: str, base: str
) -> None:
    results = []
    for transform in (leave, compile_blocks):
        model = make_model(dtype=torch.float64, num_hidden_layers=1)
        if base != "none":
            quantize_linears(model, base)
        add_adapter(model, ADAPTERS[name])
        stir(model)
        transform(model)
        found = log_probs(model, make_pairs())
        found.sum().backward()
        results.append([found, *(p.grad for p in model.parameters() if p.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_b_matrices_learn_faster_by_the_ratio(make_model: MakeModel) -> None:
    model = adapted(make_model, Adapter(3))
    scales = rate_scales(model, 16.0)
    assert scales.keys() == {f"{name}.up" for name in adapted_layers(model)}
    groups = parameter_groups(model, 0.1, scales)
    optimizer = make_optimizer("adamw", groups, learning_rate=1.0)
    set_learning_rate(optimizer, 0.5)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[layer.up] for layer in adapted_layers(model).values()} == {8.0}
    assert {rates[layer.down] for layer in adapted_layers(model).values()} == {0.5}
    assert rate_scales(model, 1.0) == {}


# --- targets ------------------------------------------------------------------------------------

LAYER = "model.layers.0."
TARGETS = {
    "all but the output": (None, 14, f"{LAYER}mlp.up_proj"),
    "names": ("q_proj, v_proj", 4, f"{LAYER}self_attn.v_proj"),
    "end of a name": ("self_attn.o_proj", 2, f"{LAYER}self_attn.o_proj"),
    "whole name": (f"{LAYER}mlp.up_proj", 1, f"{LAYER}mlp.up_proj"),
    "regular expression": (r".*\.0\..*(q|k)_proj", 2, f"{LAYER}self_attn.k_proj"),
    "output": ("lm_head", 1, "lm_head"),
}


@pytest.mark.parametrize(("targets", "count", "member"), TARGETS.values(), ids=TARGETS)
def test_targets_are_names_ends_of_names_or_a_regular_expression(
    make_model: MakeModel, targets: str | None, count: int, member: str
) -> None:
    found = find_targets(make_model(), targets)
    assert len(found) == count
    assert member in found


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("proj", r"targets: no linear layer matches 'proj'; there are down_proj, gate_proj, .*q_p"),
        ("q_proj,qproj", r"no linear layer matches 'qproj'"),
        (r".*query", r"no linear layer matches '\.\*query'"),
        ("(q_proj", r"'\(q_proj' is neither names nor a regular expression: missing \)"),
        ("embed_tokens", r"no linear layer matches 'embed_tokens'"),
    ],
)
def test_targets_that_match_nothing_are_refused(
    make_model: MakeModel, targets: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        find_targets(make_model(), targets)


def test_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"no linear layer matches ''; there are none"):
        add_adapter(nn.Sequential(nn.Tanh()), Adapter())


def test_second_adapter_is_refused(make_model: MakeModel) -> None:
    model = adapted(make_model, Adapter(3))
    with pytest.raises(InputError, match="has an adapter already: merge it before another"):
        add_adapter(model, Adapter(3))


# --- options ------------------------------------------------------------------------------------


def test_options_describe_the_adapter_with_the_defaults_of_trl() -> None:
    assert AdapterConfig(kind="lora").build() == Adapter(16, 32.0)
    given = AdapterConfig(kind="dora", rank=8, alpha=4.0, rslora=True)
    assert given.build() == Adapter(8, 4.0, is_rslora=True, is_dora=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ia3"}, r"adapter\.kind must be one of lora, dora, got 'ia3'"),
        (
            {"quantize": "int4"},
            r"adapter\.quantize must be one of int8, nf4, nf4-double, got 'int4'",
        ),
        ({"kind": "lora", "rank": 0}, r"adapter\.rank must be at least 1, got 0"),
        ({"kind": "lora", "alpha": 0.0}, r"adapter\.alpha must be above 0 and finite, got 0\.0"),
        ({"b_rate_ratio": math.inf}, r"adapter\.b_rate_ratio must be above 0 and finite, got inf"),
        ({"rank": 8}, r"adapter\.rank needs adapter\.kind: without it no adapter is made"),
        ({"alpha": 8.0}, r"adapter\.alpha needs adapter\.kind"),
        ({"rslora": True}, r"adapter\.rslora needs adapter\.kind"),
        ({"targets": "q_proj"}, r"adapter\.targets needs adapter\.kind"),
    ],
)
def test_options_out_of_range_or_without_an_adapter_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        AdapterConfig(**options)  # type: ignore[arg-type]


def test_identity_of_a_run_without_adapter_is_none() -> None:
    assert AdapterConfig(base="B").identity() is None
    assert AdapterConfig(kind="lora").identity() == AdapterConfig(kind="lora", base="B").identity()
    assert AdapterConfig(kind="lora").identity() != AdapterConfig(kind="dora").identity()
