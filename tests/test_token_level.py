"""Losses of single tokens: by hand, in their limits, and whatever the draw."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo.losses import LOSSES, PairLogProbs, TokenLoss, make_loss
from dpo.losses.token_level import AnswerTokens
from dpo.models import Decoder
from dpo.tokenized_pairs import TokenizedPairs, columns_of
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

PLAIN = TrainConfig(batch_size=8, learning_rate=1e-2, schedule="constant", steps=1)
ADJUSTING = [name for name, loss in LOSSES.items() if issubclass(loss, TokenLoss)]


@pytest.fixture
def tokens() -> AnswerTokens:
    """A pair of answers of three tokens and one."""
    return AnswerTokens(
        log_probs=torch.tensor([-1.0, -2.0, -4.0, -8.0]),
        reference=torch.tensor([-1.0, -4.0, -2.0, -7.0]),
        answer=torch.tensor([0, 0, 0, 1]),
        place=torch.tensor([0, 1, 2, 0]),
        shorter=torch.tensor([1, 1, 1, 1]),
        draw=torch.tensor([0.9, 0.1, 0.5, 0.3]),
    )


def adjusted(name: str, tokens: AnswerTokens, **options: float) -> tuple[list[float], list[float]]:
    loss = make_loss(name, **options)
    assert isinstance(loss, TokenLoss)
    found = loss.adjust(tokens)
    return found.log_probs.tolist(), found.reference.tolist()


def test_ld_dpo_scales_what_is_beyond_the_shorter_answer(tokens: AnswerTokens) -> None:
    assert adjusted("ld_dpo", tokens, alpha=0.5) == ([-1, -1, -2, -8], [-1, -2, -1, -7])


def test_sampo_keeps_as_many_tokens_as_the_shorter_answer_has(tokens: AnswerTokens) -> None:
    """One of three, of the smallest draw."""
    assert adjusted("sampo", tokens) == ([0, -2, 0, -8], [0, -4, 0, -7])


def test_humanline_clamps_the_log_ratio_of_each_token(tokens: AnswerTokens) -> None:
    """Log-ratios 0, 2, -2, -1 become 0, 1.5, -1, -1."""
    expected = ([-1, -2.5, -3, -8], [-1, -4, -2, -7])
    assert adjusted("humanline", tokens, low=-1.0, high=1.5) == expected


def scored(
    make_model: MakeModel, pairs: TokenizedPairs, loss: str, *, step: int = 1, **options: Any
) -> PairLogProbs:
    """Return what a loss sees of all pairs under a policy that is not its reference."""
    reference = Trainer(make_model(seed=1), pairs, PLAIN).batches.reference
    trainer = Trainer(
        make_model(),
        pairs,
        replace(PLAIN, **options),
        loss=loss,
        reference=reference,
        starts_at_reference=False,
    )
    with torch.no_grad():
        return trainer.score(range(len(pairs)), trainer.batches, step=step).loss_pairs


def equally_long(pairs: TokenizedPairs) -> TokenizedPairs:
    """Cut the longer answer of each pair."""
    rows = []
    for pair in pairs:
        size = min(len(pair.chosen_ids), len(pair.rejected_ids))
        rows.append(
            replace(pair, chosen_ids=pair.chosen_ids[:size], rejected_ids=pair.rejected_ids[:size])
        )
    return columns_of(rows)


@pytest.mark.parametrize("name", ["sampo", "ld_dpo"])
def test_of_equally_long_answers_they_are_dpo(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = equally_long(make_pairs(8))
    found = make_loss(name)(scored(make_model, pairs, name))
    torch.testing.assert_close(found, make_loss("sigmoid")(scored(make_model, pairs, "sigmoid")))


@pytest.mark.parametrize("name", ADJUSTING)
def test_rewards_are_those_of_the_adjusted_log_probs(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs(8)
    seen, plain = scored(make_model, pairs, name), scored(make_model, pairs, "sigmoid")
    assert not make_loss(name).rewards(seen)[0].equal(make_loss("sigmoid").rewards(plain)[0])


def test_draws_follow_from_seed_step_and_row_alone(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs(8)
    once = scored(make_model, pairs, "sampo")
    assert once.chosen.equal(scored(make_model, pairs, "sampo").chosen)
    assert not once.chosen.equal(scored(make_model, pairs, "sampo", step=2).chosen)
    assert not once.chosen.equal(scored(make_model, pairs, "sampo", seed=1).chosen)


def test_each_row_draws_numbers_of_its_own(make_pairs: MakePairs) -> None:
    from dpo.batching import draw

    both = draw([3, 5], [2, 2], seed=1, step=7)
    assert both.tokens[2:].equal(draw([5], [2], seed=1, step=7).tokens)
    assert len(np.unique(torch.cat([both.pairs, both.tokens]).numpy())) == 6


def test_wpo_weighs_a_uniform_policy_by_one(make_model: MakeModel, make_pairs: MakePairs) -> None:
    """Each token has log p = -log V, and so has the sum of squares."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainer = Trainer(model, make_pairs(8), PLAIN, loss="wpo")
    seen = trainer.score(range(8), trainer.batches).loss_pairs
    assert seen.chosen_statistic.abs().max() < 1e-5
    assert trainer.loss(seen).tolist() == pytest.approx([math.log(2)] * 8)


def one_pair(log_ratio: float, **statistics: Tensor) -> PairLogProbs:
    """A pair of answers of 4 and 2 tokens with a log-ratio of the chosen one."""
    one, zero = torch.ones(1), torch.zeros(1)
    return PairLogProbs(
        chosen=one * log_ratio,
        rejected=zero,
        reference_chosen=zero,
        reference_rejected=zero,
        chosen_tokens=one * 4,
        rejected_tokens=one * 2,
        weight=one,
        margin=zero,
        label_prob=one,
        **statistics,
    )


def test_wpo_weighs_by_the_mean_over_each_answer() -> None:
    """Sums 2 over 4 tokens and 3 over 2 are e^(0.5 + 1.5)."""
    pairs = one_pair(
        0.0, chosen_statistic=torch.tensor([2.0]), rejected_statistic=torch.tensor([3.0])
    )
    assert make_loss("wpo")(pairs).item() == pytest.approx(math.exp(2) * math.log(2))


def with_divergence(chosen: float, rejected: float) -> tuple[PairLogProbs, Tensor, Tensor]:
    of_chosen, of_rejected = torch.tensor([chosen]), torch.tensor([rejected])
    of_chosen.requires_grad_()
    of_rejected.requires_grad_()
    pairs = one_pair(2.0, chosen_statistic=of_chosen, rejected_statistic=of_rejected)
    return pairs, of_chosen, of_rejected


@pytest.mark.parametrize(("name", "taken"), [("tdpo1", 3.0), ("tdpo2", 1.5)])
def test_tdpo_takes_the_difference_of_divergences_from_the_gap(name: str, taken: float) -> None:
    """K_l - K_w = 4 - 1, of which tdpo2 takes a half."""
    pairs, of_chosen, of_rejected = with_divergence(1.0, 4.0)
    value = make_loss(name, beta=0.5)(pairs)
    assert value.item() == pytest.approx(math.log1p(math.exp(-0.5 * (2 - taken))))
    value.backward()
    assert of_rejected.grad is not None
    assert of_rejected.grad > 0
    assert (of_chosen.grad is None) == (name == "tdpo2")


def test_tdpo_sees_the_divergence_over_each_answer(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    """Against the definition, with whole distributions."""
    pairs = make_pairs(4)
    policy, other = make_model(dtype=torch.float64), make_model(seed=1, dtype=torch.float64)
    trainer = Trainer(
        policy, pairs, PLAIN, loss="tdpo1",
        reference_weights=dict(other.named_parameters()), starts_at_reference=False,
    )  # fmt: skip
    with torch.no_grad():
        batch = trainer.batches.collate(range(4))
        found = trainer.score(range(4), trainer.batches).loss_pairs
        of_policy, of_reference = (
            (model(batch.texts.stream) @ model.lm_head.weight.T).log_softmax(-1)
            for model in (policy, other)
        )
        places = batch.texts.predictors
        kl = (of_reference.exp() * (of_reference - of_policy)).sum(-1)[places]
        expected = batch.texts.sum_per_answer(kl).view(-1, 2)
    torch.testing.assert_close(found.chosen_statistic, expected[:, 0])
    torch.testing.assert_close(found.rejected_statistic, expected[:, 1])


def test_a_token_loss_is_no_term_of_a_mixture() -> None:
    from dpo.errors import InputError

    with pytest.raises(InputError, match="changes single tokens: it cannot be a term of a mixture"):
        make_loss("sampo:1,sft:1")
    with pytest.raises(InputError, match="wpo and tdpo cannot be terms of one mixture"):
        make_loss("wpo:1,tdpo1:1")
