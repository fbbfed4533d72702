"""The balance of experts: that of transformers, however a step is cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo.errors import InputError
from dpo.models import Decoder
from dpo.models.transforms import recompute
from dpo.routing import balance_loss
from dpo.tokenized_pairs import TokenizedPairs
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

EXPERTS = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
CONFIG = TrainConfig(
    batch_size=8, learning_rate=1e-2, schedule="constant", steps=3, router_loss=0.5
)


def sparse_model(make_model: MakeModel, **options: Any) -> Decoder:
    return make_model(dtype=torch.float64, **EXPERTS, **options)


def texts_of(pairs: TokenizedPairs) -> list[list[int]]:
    return [
        [*pair.prompt_ids.tolist(), *answer.tolist()]
        for pair in pairs
        for answer in (pair.chosen_ids, pair.rejected_ids)
    ]


def test_balance_is_that_of_transformers(
    make_model: MakeModel, make_pairs: MakePairs, tmp_path: Any
) -> None:
    """Every text in a row of its own, padded."""
    from dpo.models import save_model

    model, pairs = sparse_model(make_model), make_pairs(8)
    trainer = Trainer(model, pairs, CONFIG)
    use = trainer.score(range(8), trainer.batches).router
    assert use is not None
    save_model(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    texts = texts_of(pairs)
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        logits = peer(ids, attention_mask=mask, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(logits, 5, 2, mask)
    assert isinstance(expected, Tensor)
    assert balance_loss(use).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "bco"])
def test_steps_do_not_depend_on_how_they_are_cut(
    loss: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs(8)
    runs = []
    for split in (
        {"micro_batch_size": 8},
        {"micro_batch_size": 3},
        {"tokens_per_micro_batch": 40, "share_prefix": False},
    ):
        config = replace(CONFIG, **{"tokens_per_micro_batch": None, **split})  # type: ignore[arg-type]
        trainer = Trainer(sparse_model(make_model), pairs, config, loss=loss)
        balances = [step.metrics["router/balance"] for step in trainer if step.metrics is not None]
        runs.append((dict(trainer.module.named_parameters()), balances))
    (expected, balances), *others = runs
    for found, found_balances in others:
        assert found_balances == pytest.approx(balances, abs=1e-9)
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-8)


def test_gradient_is_that_of_the_loss_and_the_weighed_balance(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:

    pairs = make_pairs(8)
    config = replace(CONFIG, tokens_per_micro_batch=None, micro_batch_size=2)
    trainer = Trainer(sparse_model(make_model), pairs, config)
    rows = trainer.sampler.rows(0)
    trainer._differentiate(rows, trainer._total_weight(rows))
    found = {n: p.grad.clone() for n, p in trainer.module.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    scored = trainer.score(rows, trainer.batches)
    assert scored.router is not None
    weight = scored.loss_pairs.weight
    objective = (weight * trainer.loss(scored.loss_pairs)).sum() / weight.sum()
    (objective + 0.5 * balance_loss(scored.router)).backward()
    for name, parameter in trainer.module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9)


def test_a_heavy_balance_loss_evens_the_use(make_model: MakeModel, make_pairs: MakePairs) -> None:
    config = replace(CONFIG, steps=20, router_loss=100.0, learning_rate=3e-3)
    trainer = Trainer(sparse_model(make_model), make_pairs(8), config)
    balances = [step.metrics["router/balance"] for step in trainer if step.metrics is not None]
    assert balances[-1] < 2.05 < balances[0]  # 2 experts a token: what even use gives


def test_checkpointed_activations_change_nothing(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs(8)
    plain, checkpointed = sparse_model(make_model), sparse_model(make_model)
    recompute(checkpointed, "layer")
    for model in (plain, checkpointed):
        Trainer(model, pairs, CONFIG).train()
    for found, expected in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_router_loss_without_experts_is_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    with pytest.raises(InputError, match=r"train\.router_loss: the policy has no experts"):
        Trainer(make_model(), make_pairs(8), CONFIG)
