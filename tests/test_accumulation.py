"""Steps of every loss: the same however they are cut, and what the definition says."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo.errors import InputError
from dpo.losses import LOSSES, PairLogProbs, make_loss
from dpo.mismatch import mismatched_rows
from dpo.models import Decoder
from dpo.reference import ReferenceLogProbs
from dpo.sampling import ChainSampler
from dpo.tokenized_pairs import TokenizedPair, TokenizedPairs, columns_of
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

PLAIN = TrainConfig(batch_size=4, learning_rate=1e-2, schedule="constant", steps=5)
NOTHING = np.zeros(0, np.int32)
SPLITS: list[dict[str, Any]] = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 3},
    {"tokens_per_micro_batch": 40},
    {"tokens_per_micro_batch": 40, "share_prefix": False},
]
UNPAIRED = [name for name, loss in LOSSES.items() if loss.takes_unpaired]
WHOLE_STEP = [name for name, loss in LOSSES.items() if loss.sees_whole_step]
KEEPS_COUNT = [name for name, loss in LOSSES.items() if loss.running_start]


def data_for(name: str, pairs: TokenizedPairs) -> TokenizedPairs:
    """Give the pairs what a loss asks for."""
    rows = list(pairs)
    if name.startswith("aot"):
        rows = [replace(row, weight=1.0) for row in rows]
    if name == "odpo":
        rows = [replace(row, margin=0.5 + index % 3) for index, row in enumerate(rows)]
    if name == "plackett_luce":
        rows = chains(rows, size=3)
    return columns_of(rows)


def chains(rows: list[TokenizedPair], size: int) -> list[TokenizedPair]:
    """Join pairs to lists of ``size + 1`` answers each; the last list takes what is left."""
    joined: list[TokenizedPair] = []
    for index, row in enumerate(rows):
        if index % size:
            above = joined[-1]
            row = replace(row, prompt_ids=above.prompt_ids, chosen_ids=above.rejected_ids)
        joined.append(row)
    return joined


def unpaired(pairs: TokenizedPairs) -> TokenizedPairs:
    """Take an answer from every pair but each third."""
    rows = list(pairs)
    for index, row in enumerate(rows):
        if index % 3:
            missing = "chosen_ids" if index % 2 else "rejected_ids"
            rows[index] = replace(row, **{missing: NOTHING})  # type: ignore[arg-type]
    return columns_of(rows)


def make_trainer(
    make_model: MakeModel, pairs: TokenizedPairs, loss: str, **options: Any
) -> Trainer:
    """Make a trainer in float64 whose policy is not its reference."""
    other = make_model(seed=1, dtype=torch.float64)
    reference = mismatched = None
    if make_loss(loss).token_statistic != "reference_kl":
        plain = columns_of([replace(pair, margin=0.0) for pair in pairs])
        before = Trainer(other, plain, PLAIN, loss="kto")
        reference = before.batches.reference
        mismatched = before.mismatched.reference if before.mismatched else None
    split: dict[str, Any] = {"tokens_per_micro_batch": None} | options
    return Trainer(
        make_model(seed=0, dtype=torch.float64),
        pairs,
        replace(PLAIN, **split),
        loss=loss,
        reference=reference,
        mismatched_reference=mismatched,
        reference_weights=dict(other.named_parameters()),
        eval_pairs=pairs,
        eval_reference=reference,
        eval_mismatched_reference=mismatched,
        starts_at_reference=False,
    )


def run(trainer: Trainer, steps: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Do some steps; return the weights, and the metrics with those of an evaluation at the end."""
    lines = []
    for _ in range(steps):
        trainer.train_step()
        lines.append(trainer.close_window())
    lines.append(trainer.evaluate())
    return {n: p.detach().clone() for n, p in trainer.module.named_parameters()}, lines


def assert_equal_runs(found: Trainer, expected: Trainer, steps: int = 2) -> None:
    found_weights, found_lines = run(found, steps)
    expected_weights, expected_lines = run(expected, steps)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=1e-9)
    for found_line, expected_line in zip(found_lines, expected_lines, strict=True):
        assert found_line.keys() == expected_line.keys()
        for name, value in expected_line.items():
            if not name.startswith(("perf/", "mem/", "time/")):
                assert found_line[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("name", LOSSES)
def test_steps_of_every_loss_do_not_depend_on_how_they_are_cut(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = data_for(name, make_pairs(8))
    for split in SPLITS[1:3]:
        assert_equal_runs(
            make_trainer(make_model, pairs, name, **split),
            make_trainer(make_model, pairs, name, micro_batch_size=8),
        )


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("split", SPLITS)
def test_steps_of_unpaired_rows_do_not_depend_on_how_they_are_cut(
    name: str, split: dict[str, Any], make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = unpaired(make_pairs(8))
    assert_equal_runs(
        make_trainer(make_model, pairs, name, **split),
        make_trainer(make_model, pairs, name, micro_batch_size=8),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_tiny_model(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = data_for(name, make_pairs(8))
    config = replace(PLAIN, batch_size=8, steps=8, learning_rate=3e-3)
    trainer = Trainer(make_model(), pairs, config, loss=name, eval_pairs=pairs)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval/loss"] < before["eval/loss"]


@pytest.mark.parametrize("name", WHOLE_STEP)
def test_gradient_of_a_whole_step_is_that_of_one_graph(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = data_for(name, make_pairs(8))
    trainer = make_trainer(make_model, pairs, name, micro_batch_size=2, batch_size=8)
    rows = trainer.sampler.rows(0)
    trainer._differentiate(rows, trainer._total_weight(rows))
    found = [p.grad.clone() for p in trainer.module.parameters() if p.grad is not None]

    trainer.optimizer.zero_grad()
    seen = trainer.score(rows, trainer.batches, step=1).loss_pairs
    seen = replace(seen, running=trainer.running)
    seen = replace(seen, running=trainer.loss.update(seen))
    weights = trainer.loss.pair_weights(seen)
    ((weights * trainer.loss(seen)).sum() / weights.sum()).backward()
    expected = [p.grad for p in trainer.module.parameters() if p.grad is not None]
    for gradient, definition in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, definition, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*KEEPS_COUNT, "sampo", "tdpo2", "kto", "plackett_luce"])
def test_resumed_run_equals_unbroken_run_bit_for_bit(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = data_for(name, make_pairs(8))
    unbroken = Trainer(make_model(), pairs, PLAIN, loss=name)
    unbroken.train()
    first = Trainer(make_model(), pairs, PLAIN, loss=name)
    for _ in range(2):
        first.train_step()
    held = {stem: {n: t.clone() for n, t in part.items()} for stem, part in first.tensors().items()}
    resumed = Trainer(make_model(seed=0), pairs, PLAIN, loss=name)
    resumed.restore(held, first.state())
    resumed.train()
    for name_, parameter in unbroken.module.named_parameters():
        assert parameter.equal(dict(resumed.module.named_parameters())[name_])
    assert resumed.running.equal(unbroken.running)


# Losses that change over a run

SHIFT: dict[str, float] = {"rejected_weight": 1.0, "final_rejected_weight": 0.5}


def shifting(make_model: MakeModel, pairs: TokenizedPairs, config: TrainConfig = PLAIN) -> Trainer:
    """A trainer of DPO-Shift whose lambda falls from 1 to 0.5."""
    return Trainer(
        make_model(), pairs, config, loss=make_loss("dpo_shift", **SHIFT), eval_pairs=pairs
    )


def test_each_step_has_the_loss_of_its_share_of_the_run(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    """Lambda is 1, 0.9, ... 0.6 in the five steps."""
    trainer = shifting(make_model, make_pairs(8))
    for step in range(5):
        seen = trainer.score(trainer.sampler.rows(step), trainer.batches).loss_pairs
        values = make_loss("dpo_shift", rejected_weight=1 - 0.1 * step)(seen)
        trainer.train_step()
        expected = (seen.weight * values.detach()).sum() / seen.weight.sum()
        assert trainer.close_window()["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_evaluations_measure_by_the_loss_of_the_end(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = shifting(make_model, make_pairs(8))
    fixed = make_loss("dpo_shift", rejected_weight=0.5)
    for _ in range(2):
        trainer.train_step()
    found = trainer.evaluate()["eval/loss"]
    trainer.loss = fixed
    assert found == trainer.evaluate()["eval/loss"]


def test_run_whose_loss_changes_resumes_bit_for_bit(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs(8)
    unbroken, first = shifting(make_model, pairs), shifting(make_model, pairs)
    unbroken.train()
    for _ in range(2):
        first.train_step()
    resumed = shifting(make_model, pairs)
    resumed.restore(first.tensors(), first.state())
    resumed.train()
    expected = dict(unbroken.module.named_parameters())
    for name, parameter in resumed.module.named_parameters():
        assert parameter.equal(expected[name])


def test_run_whose_loss_changes_goes_on_in_no_other_length(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    first = shifting(make_model, make_pairs(8))
    for _ in range(2):
        first.train_step()
    longer = shifting(make_model, make_pairs(8), replace(PLAIN, steps=6))
    with pytest.raises(InputError, match=r"the run has changed: total_steps was 5 and is 6"):
        longer.restore(first.tensors(), first.state())


# Whole steps


def test_bco_measures_from_the_mean_of_all_rewards_so_far(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = make_trainer(make_model, make_pairs(8), "bco", micro_batch_size=2)
    rewards = []
    for _ in range(2):
        pairs = trainer.score(trainer.sampler.rows(trainer.step), trainer.batches).pairs
        rewards += [reward.detach() for reward in trainer.loss.rewards(pairs)]
        trainer.train_step()
    total, count = trainer.running.tolist()
    assert count == 16
    assert total / count == pytest.approx(float(torch.cat(rewards).mean()), abs=1e-6)


def test_kto_measures_from_answers_to_other_prompts(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    """Against naive log-probs of the prompt of each row with the answer that stands beside it."""
    pairs = make_pairs(8)
    trainer = make_trainer(make_model, pairs, "kto", micro_batch_size=3)
    rows = trainer.sampler.rows(0)
    beside = mismatched_rows(pairs, seed=0)
    policy, other = make_model(dtype=torch.float64), make_model(seed=1, dtype=torch.float64)
    differences = [
        log_prob(policy, beside[row].prompt_ids, beside[row].chosen_ids)
        - log_prob(other, beside[row].prompt_ids, beside[row].chosen_ids)
        for row in rows
    ]
    found = trainer._mismatch(trainer.mismatched, rows)
    assert float(found) == pytest.approx(sum(differences) / len(rows), abs=1e-5)


def log_prob(model: Decoder, prompt: Any, answer: Any) -> float:
    from dpo.batching import collate_answers

    texts = collate_answers([(prompt, [answer])], multiple_of=1)
    with torch.no_grad():
        log_probs = (model(texts.stream) @ model.lm_head.weight.T).log_softmax(dim=-1)
    return float(log_probs[texts.predictors, texts.targets].sum())


@given(prompts=st.lists(st.integers(0, 5), min_size=2, max_size=30), seed=st.integers(0, 3))
def test_mismatched_rows_have_their_prompt_and_an_answer_to_another(
    prompts: list[int], seed: int
) -> None:
    """An answer is its prompt's number and its row's."""
    rows = [
        TokenizedPair(
            np.full(1 + prompt, prompt, np.int32), np.array([prompt, row], np.int32), NOTHING
        )
        for row, prompt in enumerate(prompts)
    ]
    pairs = columns_of(rows)
    if len(set(prompts)) == 1:
        with pytest.raises(InputError, match="all rows have one prompt: choose kto_pair or bco"):
            mismatched_rows(pairs, seed=seed)
        return
    longest = max(1 + prompt for prompt in prompts) + 2
    for prompt, row in zip(prompts, mismatched_rows(pairs, seed=seed), strict=True):
        assert row.prompt_ids.tolist() == [prompt] * (1 + prompt)
        assert row.chosen_ids[0] != prompt
        assert 1 <= len(row.chosen_ids) <= 2
        assert len(row.prompt_ids) + len(row.chosen_ids) <= longest
        assert not len(row.rejected_ids)


def test_chains_are_pairs_of_which_one_goes_on_where_the_other_ends() -> None:
    a, b, c, d = (np.array([token], np.int32) for token in (1, 2, 3, 4))
    pairs = columns_of(
        [
            TokenizedPair(a, b, c),
            TokenizedPair(a, c, d),  # the same list
            TokenizedPair(a, c, b),  # not what the last one ends with
            TokenizedPair(d, b, a),  # another prompt
        ]
    )
    assert pairs.chains.tolist() == [0, 0, 1, 2]


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12), batch_size=st.integers(1, 5))
def test_steps_hold_whole_chains_and_an_epoch_every_row_once(
    sizes: list[int], batch_size: int
) -> None:
    chains_of = np.repeat(np.arange(len(sizes)), sizes)
    sampler = ChainSampler(chains_of, batch_size, seed=1)
    steps = [sampler.rows(step) for step in range(sampler.steps_per_epoch)]
    assert sorted(itertools.chain.from_iterable(steps)) == list(range(len(chains_of)))
    for rows in steps:
        found = [
            list(group) for _, group in itertools.groupby(rows, key=lambda row: chains_of[row])
        ]
        assert len(found) <= batch_size
        for group in found:
            assert group == np.flatnonzero(chains_of == chains_of[group[0]]).tolist()


@given(sizes=st.lists(st.integers(2, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_plackett_luce_is_the_likelihood_of_the_ranking(sizes: list[int], seed: int) -> None:
    """For answers ranked 1 to K: product over k of e^s_k / sum of e^s_j for j >= k."""
    generator = torch.Generator().manual_seed(seed)
    lists = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    expected = [
        scores[place:].logsumexp(0) - scores[place]
        for scores in lists
        for place in range(len(scores) - 1)
    ]
    zero = torch.zeros(len(expected), dtype=torch.float64)
    pairs = PairLogProbs(
        chosen=torch.cat([scores[:-1] for scores in lists]),
        rejected=torch.cat([scores[1:] for scores in lists]),
        reference_chosen=zero,
        reference_rejected=zero,
        chosen_tokens=zero + 1,
        rejected_tokens=zero + 1,
        weight=zero + 1,
        margin=zero,
        label_prob=zero + 1,
        chain=torch.from_numpy(np.repeat(np.arange(len(sizes)), np.array(sizes) - 1)),
    )
    found = make_loss("plackett_luce", beta=1.0)(pairs)
    torch.testing.assert_close(found, torch.stack(expected))


def test_beta_dpo_keeps_the_share_that_it_is_told(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = make_trainer(make_model, make_pairs(8), "beta_dpo", micro_batch_size=2, batch_size=8)
    rows = trainer.sampler.rows(0)
    losses = trainer._differentiate(rows, trainer._total_weight(rows)).losses
    assert int((losses > 0).sum()) == 6  # of 8 with keep = 0.8


def gaps(chosen: Tensor, **others: Tensor) -> PairLogProbs:
    """Pairs of answers of one token, with these log-ratios of the chosen ones and none else."""
    one, zero = torch.ones_like(chosen), torch.zeros_like(chosen)
    return PairLogProbs(
        chosen=chosen,
        rejected=zero,
        reference_chosen=zero,
        reference_rejected=zero,
        chosen_tokens=one,
        rejected_tokens=one,
        weight=one,
        margin=zero,
        label_prob=one,
        **others,
    )


def test_beta_dpo_draws_outliers_less_often() -> None:
    """Of ten rewards nine are near their mean; the tenth is far out."""
    gap = torch.cat([torch.linspace(-0.1, 0.1, 9), torch.tensor([50.0])])
    generator = torch.Generator().manual_seed(0)
    loss, kept = make_loss("beta_dpo", keep=0.5, beta=1.0), torch.zeros(10)
    for _ in range(200):
        draw = torch.rand(10, generator=generator)
        running = torch.tensor([0.0, 1.0])
        pairs = gaps(gap, draw=draw)
        kept += (loss(replace(pairs, running=running)) > 0).float()
    assert kept[9] == 0
    assert (kept[:9] > 60).all()


def test_moving_averages_of_alpha_dpo_start_at_zero() -> None:
    """Gaps 1 and 3: mean 2 and deviation 1, of which a tenth is taken."""
    gap = torch.tensor([1.0, 3.0])
    pairs = gaps(gap, running=torch.zeros(2))
    assert make_loss("alpha_dpo").update(pairs).tolist() == pytest.approx([0.2, 0.1])


# Answers of several turns


def with_turns(pairs: TokenizedPairs) -> TokenizedPairs:
    """Make context of every other token of the answers, but for the last."""
    rows = []
    for pair in pairs:
        answers = {"chosen_ids": pair.chosen_ids.copy(), "rejected_ids": pair.rejected_ids.copy()}
        for answer in answers.values():
            answer[-2::-2] = -1 - answer[-2::-2]
        rows.append(replace(pair, **answers))  # type: ignore[arg-type]
    return columns_of(rows)


@pytest.mark.parametrize("name", ["sigmoid", "sft", "ld_dpo", "sampo", "tdpo2", "wpo", "kto"])
def test_steps_of_turns_do_not_depend_on_how_they_are_cut(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = with_turns(make_pairs(8))
    for split in SPLITS:
        assert_equal_runs(
            make_trainer(make_model, pairs, name, **split),
            make_trainer(make_model, pairs, name, micro_batch_size=8),
            steps=1,
        )


def test_tokens_of_context_are_read_and_not_scored(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    """Against the log-probs of whole answers, of which every other is taken."""
    pairs = make_pairs(8)
    plain = Trainer(make_model(dtype=torch.float64), pairs, PLAIN)
    turned = Trainer(make_model(dtype=torch.float64), with_turns(pairs), PLAIN)
    assert plain.batches.reference is not None
    assert turned.batches.reference is not None
    for whole, part in zip(plain.batches.reference, turned.batches.reference, strict=True):
        for of_whole, of_part in zip(whole, part, strict=True):
            np.testing.assert_allclose(of_part, of_whole[::-1][::2][::-1], rtol=0, atol=1e-6)


# Moving references


def test_reference_that_is_copied_at_each_step_keeps_the_loss_at_its_start(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, reference_sync_every=1, reference_sync_share=1.0)
    trainer = Trainer(make_model(), make_pairs(8), config)
    losses = [step.metrics["loss"] for step in trainer if step.metrics is not None]
    assert losses == pytest.approx([np.log(2)] * 5, abs=1e-5)


def test_reference_moves_by_its_share_every_so_many_steps(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, reference_sync_every=2, reference_sync_share=0.25)
    trainer = Trainer(make_model(), make_pairs(8), config)
    start = dict(make_model().named_parameters())
    assert trainer.live_reference is not None
    trainer.train_step()
    for name, weight in trainer.live_reference.weights.items():
        assert weight.equal(start[name])
    trainer.train_step()
    for name, parameter in trainer.module.named_parameters():
        torch.testing.assert_close(
            trainer.live_reference.weights[name], 0.75 * start[name] + 0.25 * parameter
        )


def test_run_with_a_moving_reference_resumes_bit_for_bit(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, reference_sync_every=2)
    unbroken = Trainer(make_model(), make_pairs(8), config)
    unbroken.train()
    first = Trainer(make_model(), make_pairs(8), config)
    for _ in range(3):
        first.train_step()
    held = {stem: {n: t.clone() for n, t in part.items()} for stem, part in first.tensors().items()}
    resumed = Trainer(make_model(), make_pairs(8), config)
    resumed.restore(held, first.state())
    resumed.train()
    for found, expected in zip(
        resumed.module.parameters(), unbroken.module.parameters(), strict=True
    ):
        assert found.equal(expected)


def test_live_reference_equals_the_cached_one(make_model: MakeModel, make_pairs: MakePairs) -> None:
    pairs = make_pairs(8)
    cached = Trainer(make_model(), pairs, PLAIN)
    live = Trainer(make_model(), pairs, replace(PLAIN, reference_sync_every=99))
    assert live.batches.reference is None
    cached.train()
    live.train()
    for found, expected in zip(live.module.parameters(), cached.module.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_reference_of_another_architecture_cannot_be_live(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    other = dict(make_model(hidden_size=32).named_parameters())
    with pytest.raises(
        InputError, match=r"must have the policy's architecture.*weights do not fit"
    ):
        Trainer(make_model(), make_pairs(8), PLAIN, loss="tdpo2", reference_weights=other)


# Refusals


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in UNPAIRED])
def test_losses_that_compare_refuse_unpaired_rows(name: str, make_pairs: MakePairs) -> None:
    pairs = unpaired(data_for(name, make_pairs(8)))
    with pytest.raises(
        InputError, match=r"rows have one answer \(the first is row 1\).*kto or bco"
    ):
        make_loss(name).check(pairs)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_losses_refuse_weights(name: str, make_pairs: MakePairs) -> None:
    with pytest.raises(InputError, match="pair 1 has another weight than pair 0"):
        make_loss(name).check(make_pairs(8))


def test_options_that_a_loss_would_ignore_are_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    moving = replace(PLAIN, reference_sync_every=1)
    with pytest.raises(
        InputError, match=r"reference_sync_every: SimPo\(.* has no reference to move"
    ):
        Trainer(make_model(), make_pairs(8), moving, loss="simpo")
    grouped = replace(PLAIN, group_prompts=True)
    with pytest.raises(InputError, match=r"group_prompts has no effect with PlackettLuce\("):
        Trainer(make_model(), make_pairs(8), grouped, loss="plackett_luce")


def test_odpo_refuses_gaps_without_a_logarithm(make_pairs: MakePairs) -> None:
    with pytest.raises(InputError, match=r"8 pairs have none above 0 \(the first is pair 0\)"):
        make_loss("odpo").check(make_pairs(8))


@pytest.mark.parametrize("loss", ["sigmoid:0.8,sft:1", "sigmoid:0.8,bco:0.2,sft:1", "kto:1,ipo:3"])
def test_terms_of_a_mixture_add_up_to_it_however_a_step_is_cut(
    loss: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs, names = make_pairs(8), dict(term.split(":") for term in loss.split(","))
    whole = make_trainer(make_model, pairs, loss, micro_batch_size=8)
    assert_equal_runs(make_trainer(make_model, pairs, loss, tokens_per_micro_batch=40), whole)
    for line, prefix in ((whole.evaluate(), "eval/"), (step_of(whole), "")):
        terms = {n.removeprefix(f"{prefix}loss/"): v for n, v in line.items() if "loss/" in n}
        assert terms.keys() == names.keys()
        total = sum(float(names[term]) * value for term, value in terms.items())
        assert line[f"{prefix}loss"] == pytest.approx(total)


@pytest.mark.parametrize("loss", ["sigmoid:0.8,sft:1", "sigmoid:0.8,bco:0.2"])
def test_evaluated_terms_are_means_over_the_rows_by_their_weights(
    loss: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = make_trainer(make_model, make_pairs(8), loss, micro_batch_size=3)
    trainer.train_step()
    assert trainer.eval_batches is not None
    seen = trainer.score(range(8), trainer.eval_batches).loss_pairs
    values = trainer.loss.with_terms(replace(seen, running=trainer.running))
    expected = (values * seen.weight).sum(dim=1) / seen.weight.sum()
    evaluated = trainer.evaluate()
    terms = [value for name, value in evaluated.items() if name.startswith("eval/loss/")]
    found = [evaluated["eval/loss"], *terms]
    assert found == pytest.approx(expected.tolist())


def step_of(trainer: Trainer) -> dict[str, float]:
    trainer.train_step()
    return trainer.close_window()


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(["bco:1,sigmoid:0.5", "kto:1,bco:2", "wpo:1,beta_dpo:1"]))
def test_mixture_carries_the_running_statistics_of_its_terms(
    name: str, make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs(8)
    references: ReferenceLogProbs | None = None
    runs = []
    for split in ({"micro_batch_size": 8}, {"micro_batch_size": 3}):
        config = replace(PLAIN, tokens_per_micro_batch=None, **split)  # type: ignore[arg-type]
        trainer = Trainer(
            make_model(dtype=torch.float64), pairs, config, loss=name, reference=references
        )
        for _ in range(3):
            trainer.train_step()
        runs.append(trainer)
    assert len(runs[0].running) == 2
    assert runs[0].running.any()
    torch.testing.assert_close(runs[1].running, runs[0].running)
    for found, expected in zip(
        runs[1].module.parameters(), runs[0].module.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
