import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.batching import PairBatch
from dpo.errors import InputError, RunError
from dpo.losses import PairLogProbs, make_loss
from dpo.models import Decoder
from dpo.models.transforms import RECOMPUTED, compile_blocks, recompute
from dpo.optim import OPTIMIZERS
from dpo.scoring import MicroBatches
from dpo.tokenization import TokenizedPairs, columns_of
from dpo.train_config import Recompute, TrainConfig
from dpo.trainer import NonFiniteError, Trainer
from dpo.transformers_policy import TransformersPolicy

MakeModel = Callable[..., Decoder]
MakePairs = Callable[..., TokenizedPairs]

PLAIN = TrainConfig(batch_size=4, learning_rate=1e-2, schedule="constant", steps=5)


PROMISED = {  # what scripts rely on in a line about a step
    *("step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
    *("logps/chosen", "logps/rejected", "grad_norm", "learning_rate"),
    *("perf/step_s", "perf/pairs_per_s", "perf/tokens_per_s", "mem/peak_mib"),
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def one_step(
    make_model: MakeModel, pairs: TokenizedPairs, loss: str, **options: Any
) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    """Do one step in float64 from a policy that is not its reference."""
    reference = Trainer(make_model(seed=1, dtype=torch.float64), pairs, PLAIN).batches.reference
    model = make_model(seed=0, dtype=torch.float64)
    split: dict[str, Any] = {"tokens_per_micro_batch": None} | options
    config = replace(PLAIN, batch_size=len(pairs), steps=1, **split)
    trainer = Trainer(
        model, pairs, config, loss=loss, reference=reference, starts_at_reference=False
    )
    step = next(iter(trainer))
    assert step.metrics is not None
    return weights(model), step.metrics


def with_shared_prompts(pairs: TokenizedPairs, different: int) -> TokenizedPairs:
    """Give the pairs so many different prompts, and some pairs of a prompt the same answers."""
    changed = []
    for row, pair in enumerate(pairs):
        first = pairs[row % different]
        chosen = pair.chosen_ids
        if row % 3 == 2 and not np.array_equal(first.rejected_ids, pair.rejected_ids):
            chosen = first.rejected_ids  # equal answers would tie, or not, by round-off
        changed.append(replace(pair, prompt_ids=first.prompt_ids, chosen_ids=chosen))
    return columns_of(changed)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 5),
    loss=st.sampled_from(["sigmoid", "ipo", "sft", "rpo"]),
    micro_batch_size=st.one_of(st.none(), st.integers(1, 8)),
    tokens=st.integers(1, 120),
    share_prefix=st.booleans(),
    group_prompts=st.booleans(),
    different_prompts=st.integers(1, 8),
)
def test_step_does_not_depend_on_how_it_is_split(
    make_model: MakeModel,
    make_pairs: MakePairs,
    seed: int,
    loss: str,
    micro_batch_size: int | None,
    tokens: int,
    share_prefix: bool,
    group_prompts: bool,
    different_prompts: int,
) -> None:
    pairs = with_shared_prompts(make_pairs(8, seed=seed), different_prompts)
    sharing = {"share_prefix": share_prefix, "group_prompts": share_prefix and group_prompts}
    split = {"micro_batch_size": micro_batch_size}
    if micro_batch_size is None:
        split = {"tokens_per_micro_batch": tokens}
    expected_weights, expected = one_step(
        make_model, pairs, loss, micro_batch_size=8, share_prefix=False
    )
    found_weights, found = one_step(make_model, pairs, loss, **sharing, **split)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=1e-10)
    for name, value in expected.items():
        if not name.startswith(("perf/", "mem/", "time/")):
            assert found[name] == pytest.approx(value, abs=1e-10), name


def naive_dpo_losses(
    model: Decoder, pairs: TokenizedPairs, order: list[list[int]], learning_rate: float
) -> list[float]:
    """Train with whole logits, one answer at a time, and torch's AdamW: the definition."""
    from dpo.batching import collate_answers

    def log_prob(prompt: Any, answer: Any) -> Tensor:
        texts = collate_answers([(prompt, [answer])], multiple_of=1)
        log_probs = (model(texts.stream) @ model.lm_head.weight.T).log_softmax(dim=-1)
        total: Tensor = log_probs[texts.predictors, texts.targets].sum()
        return total

    def gaps(rows: list[int]) -> Tensor:
        return torch.stack(
            [
                log_prob(pairs[row].prompt_ids, pairs[row].chosen_ids)
                - log_prob(pairs[row].prompt_ids, pairs[row].rejected_ids)
                for row in rows
            ]
        )

    with torch.no_grad():
        reference = gaps(list(range(len(pairs))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for rows in order:
        weight = torch.tensor([pairs[row].weight for row in rows], dtype=torch.float64)
        values = -nn.functional.logsigmoid(0.1 * (gaps(rows) - reference[rows]))
        loss = (weight * values).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_five_steps_equal_the_definition(make_model: MakeModel, make_pairs: MakePairs) -> None:
    pairs = make_pairs(8)
    trainer = Trainer(make_model(dtype=torch.float64), pairs, replace(PLAIN, max_grad_norm=None))
    found = [step.metrics["loss"] for step in trainer if step.metrics is not None]
    order = [trainer.sampler.rows(step) for step in range(5)]
    expected = naive_dpo_losses(make_model(dtype=torch.float64), pairs, order, 1e-2)
    assert found == pytest.approx(expected, abs=1e-6)  # the reference is float32
    assert found[-1] < found[0]


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bf16-mixed", 3e-3)])
def test_first_loss_is_ln_2(
    make_model: MakeModel, make_pairs: MakePairs, dtype: Any, noise: float
) -> None:
    trainer = Trainer(make_model(), make_pairs(), replace(PLAIN, dtype=dtype))
    metrics = next(iter(trainer)).metrics
    assert metrics is not None
    assert metrics["loss"] == pytest.approx(math.log(2), abs=noise)


def test_policy_that_does_not_start_at_its_reference_is_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs()
    other = Trainer(make_model(seed=1), pairs, PLAIN).batches.reference
    with pytest.raises(RunError, match=r"does not start at its reference.*another model"):
        Trainer(make_model(seed=0), pairs, PLAIN, reference=other).train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_prompts": True},
        {"ema_decay": 0.5, "rates": {"norm": 0.1}},
        *({"optimizer": name} for name in OPTIMIZERS if name != "adamw"),
    ],
    ids=str,
)
def test_resumed_run_equals_unbroken_run_bit_for_bit(
    make_model: MakeModel, make_pairs: MakePairs, options: dict[str, Any]
) -> None:
    pairs = with_shared_prompts(make_pairs(10), 4)
    config = TrainConfig(
        **{"batch_size": 4, "learning_rate": 1e-2, "schedule": "constant", "steps": 5, **options}
    )
    whole = Trainer(make_model(), pairs, config)
    whole.train()
    first = Trainer(make_model(), pairs, config)
    for step in first:
        if step.number == 2:
            break
    tensors = {stem: {k: v.clone() for k, v in t.items()} for stem, t in first.tensors().items()}
    state = first.state()
    second = Trainer(make_model(), pairs, config)
    second.restore(tensors, state)
    second.train()
    for name, weight in weights(whole.module).items():
        assert torch.equal(weight, weights(second.module)[name])
    with whole.averaged_weights(), second.averaged_weights():
        for name, weight in weights(whole.module).items():
            assert torch.equal(weight, weights(second.module)[name])
    assert second.tokens_seen == whole.tokens_seen


OTHER_MATHEMATICS: dict[str, tuple[Any, str]] = {
    "batch_size": (2, "batch_size was 4 and is 2; total_steps was 4 and is 8"),
    "seed": (7, "seed was 0 and is 7"),
    "group_prompts": (True, "group_prompts was False and is True"),
    "dtype": ("bf16-mixed", "dtype was 'float32' and is 'bf16-mixed'"),
    "tf32": (True, "tf32 was False and is True"),
    "learning_rate": (0.02, "learning_rate was 0.01 and is 0.02"),
    "schedule": ("cosine", "schedule was 'linear' and is 'cosine'"),
    "epochs": (3, "total_steps was 4 and is 6; on it depend learning rates, or the loss, .*"),
    "warmup_steps": (1, "warmup_steps was 0 and is 1"),
    "weight_decay": (0.1, r"weight_decay was 0\.0 and is 0\.1"),
    "max_grad_norm": (None, r"max_grad_norm was 1\.0 and is None"),
    "beta1": (0.8, r"beta1 was 0\.9 and is 0\.8"),
    "beta2": (0.99, r"beta2 was 0\.999 and is 0\.99"),
    "epsilon": (1e-6, "epsilon was 1e-08 and is 1e-06"),
    "rates": ({"norm": 0.5, "q": 2}, r"rates was None and is 'norm = 0\.5, q = 2\.0'"),
    "ema_decay": (0.9, r"ema_decay was None and is 0\.9"),
}


@pytest.mark.parametrize("option", OTHER_MATHEMATICS)
def test_resuming_with_other_mathematics_is_refused_naming_both_values(
    make_model: MakeModel, make_pairs: MakePairs, option: str
) -> None:
    value, message = OTHER_MATHEMATICS[option]
    config = replace(PLAIN, schedule="linear", steps=None, epochs=2)
    trainer = Trainer(make_model(), make_pairs(), config)
    trainer.train()
    changes: dict[str, Any] = {option: value}
    other = Trainer(make_model(), make_pairs(), replace(config, **changes))
    with pytest.raises(InputError, match=f"the run has changed: {message}$"):
        other.restore(trainer.tensors(), trainer.state())


def test_resuming_with_other_pairs_or_another_loss_is_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = Trainer(make_model(), make_pairs(), PLAIN)
    with pytest.raises(InputError, match=r"the run has changed: data was '[0-9a-f]+' and is '"):
        Trainer(make_model(), make_pairs(seed=1), PLAIN).restore({}, trainer.state())
    other = Trainer(make_model(), make_pairs(), PLAIN, loss="hinge")
    with pytest.raises(InputError, match=r"loss was 'Sigmoid\(.*\)' and is 'Hinge\("):
        other.restore({}, trainer.state())


def test_other_held_out_pairs_are_refused_where_they_decide_what_is_kept(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    def trainer(config: TrainConfig, seed: int) -> Trainer:
        return Trainer(make_model(), make_pairs(), config, eval_pairs=make_pairs(4, seed=seed))

    plain = trainer(PLAIN, 1)
    trainer(PLAIN, 2).restore(plain.tensors(), plain.state())
    for changes in ({"keep_best": True}, {"early_stopping": 2}):
        config = replace(PLAIN, eval_every=1, **changes)
        with pytest.raises(InputError, match=r"changed: eval_data was '[0-9a-f]+' and is '"):
            trainer(config, 2).restore({}, trainer(config, 1).state())


@pytest.mark.parametrize(
    ("options", "done", "is_same"),
    [
        ({"schedule": "constant"}, 6, True),
        ({"schedule": "linear"}, 1, True),  # the first rate is the same whatever follows
        ({"schedule": "linear"}, 2, False),
        ({"schedule": "linear", "warmup_steps": 3}, 4, True),
        ({"schedule": "cosine"}, 2, False),
        ({"schedule": "wsd", "decay_share": 0.5}, 4, True),  # 3 steps at 1 and the first decayed
        ({"schedule": "wsd", "decay_share": 0.5}, 5, False),
    ],
)
def test_length_of_the_run_may_change_where_no_rate_of_the_steps_done_depends_on_it(
    make_model: MakeModel,
    make_pairs: MakePairs,
    options: dict[str, Any],
    done: int,
    is_same: bool,
) -> None:
    config = replace(PLAIN, steps=6, **options)
    trainer = Trainer(make_model(), make_pairs(), config)
    for step in trainer:
        if step.number == done:
            break
    longer = Trainer(make_model(), make_pairs(), replace(config, steps=9))
    refused = nullcontext() if is_same else pytest.raises(InputError, match="total_steps was 6 and")
    with refused:
        longer.restore(trainer.tensors(), trainer.state())
        assert longer.total_steps == 9


def test_own_loss_is_known_by_its_name_and_options_when_resuming() -> None:
    def shown(**options: float) -> str:
        def mine(pairs: PairLogProbs, scale: float = 1.0) -> Tensor:
            return pairs.chosen * scale

        return repr(make_loss(mine, **options))

    assert shown() == shown()
    assert shown(scale=1.0) != shown(scale=2.0)


def test_evaluation_does_not_depend_on_the_batch_size(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    results = []
    for micro_batch_size in (1, 3, 8):
        config = replace(PLAIN, micro_batch_size=micro_batch_size, tokens_per_micro_batch=None)
        trainer = Trainer(
            make_model(dtype=torch.float64),
            make_pairs(4),
            config,
            eval_pairs=make_pairs(8, seed=5),
        )
        results.append([step.evaluation for step in trainer][-1])
    assert results[0] is not None
    assert results[1] == pytest.approx(results[0], abs=1e-10)
    assert results[2] == pytest.approx(results[0], abs=1e-10)


@pytest.mark.parametrize("loss", ["sigmoid", "dr_dpo"])
def test_evaluation_keeps_no_graph(loss: str, make_model: MakeModel, make_pairs: MakePairs) -> None:
    """What the backward pass would need is most of the memory of a forward pass."""
    trainer = Trainer(make_model(), make_pairs(), PLAIN, loss=loss, eval_pairs=make_pairs(8))
    grad_modes: list[bool] = []
    trainer.module.register_forward_hook(
        lambda _module, _arguments, hidden: grad_modes.append(hidden.requires_grad)
    )
    trainer.evaluate()
    assert grad_modes
    assert not any(grad_modes)


def test_metrics_of_a_step_have_the_names_that_scripts_rely_on(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    lines: list[Mapping[str, float]] = []
    trainer = Trainer(
        make_model(),
        make_pairs(),
        replace(PLAIN, steps=1),
        eval_pairs=make_pairs(4, seed=1),
        callbacks=[lambda _, metrics: lines.append(metrics)],
    )
    trainer.train()
    before, step, after = lines
    assert set(step) >= PROMISED
    assert {"step", "eval/loss", "eval/rewards/accuracy", "eval/logps/chosen"} <= set(before)
    assert (before["step"], after["step"]) == (0, 1)
    assert step["logps/chosen"] < 0


def test_training_from_the_cache_equals_training_with_a_live_reference(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = make_pairs()
    own = Trainer(make_model(), pairs, PLAIN)
    given = Trainer(make_model(), pairs, PLAIN, reference=own.batches.reference)
    own.train()
    given.train()
    for name, weight in weights(own.module).items():
        assert torch.equal(weight, weights(given.module)[name])


class Poisoned(nn.Module):
    """A loss that is not finite for one row, or whose gradient is not."""

    def __init__(self, chosen_tokens: float, *, only_gradient: bool) -> None:
        super().__init__()
        self.chosen_tokens, self.only_gradient = chosen_tokens, only_gradient

    def forward(self, pairs: PairLogProbs) -> Tensor:
        is_guilty = pairs.chosen_tokens == self.chosen_tokens
        values = pairs.log_ratio_gap.clone()
        gap = values[is_guilty]
        values[is_guilty] = (gap - gap.detach()).sqrt() if self.only_gradient else gap * torch.nan
        return values


def poisoned_pairs(make_pairs: MakePairs) -> TokenizedPairs:
    pairs = list(make_pairs(8))
    pairs[5] = replace(pairs[5], chosen_ids=np.arange(20, dtype=np.int32), id="the bad one")
    return columns_of(pairs)


@pytest.mark.parametrize("only_gradient", [False, True])
def test_nonfinite_step_stops_before_the_update_and_names_the_row(
    make_model: MakeModel, make_pairs: MakePairs, only_gradient: bool
) -> None:
    model = make_model()
    before = weights(model)
    trainer = Trainer(
        model,
        poisoned_pairs(make_pairs),
        replace(PLAIN, batch_size=8),
        loss=Poisoned(20, only_gradient=only_gradient),
    )
    with pytest.raises(
        NonFiniteError, match="from rows the bad one; the weights are unchanged"
    ) as e:
        trainer.train()
    assert e.value.rows == [5]
    assert e.value.step == 1  # as the metrics would have counted it
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name])


def test_nonfinite_step_is_skipped_and_counted_if_asked(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    trainer = Trainer(
        make_model(),
        poisoned_pairs(make_pairs),
        replace(PLAIN, steps=2, on_nonfinite="skip"),
        loss=Poisoned(20, only_gradient=False),
    )
    metrics = [step.metrics for step in trainer]
    assert trainer.skipped_steps == 1
    assert metrics[-1] is not None
    assert metrics[-1]["health/nonfinite"] == 1
    for of_step in metrics:
        assert of_step is not None
        assert set(of_step) >= PROMISED
        assert of_step["learning_rate"] == 1e-2
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.module.parameters())


def test_policy_without_trainable_parameters_is_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    def constant(pairs: PairLogProbs) -> Tensor:
        return pairs.chosen * 0.0

    with pytest.raises(RunError, match="no gradient reaches the policy"):
        Trainer(make_model(), make_pairs(), PLAIN, loss=constant).train()


def test_weights_that_sum_to_nothing_are_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = columns_of([replace(pair, weight=0.0) for pair in make_pairs()])
    with pytest.raises(RunError, match=r"step 1: the weights of its 4 pairs sum to 0\.0"):
        Trainer(make_model(), pairs, PLAIN).train()


def test_no_pairs_are_refused(make_model: MakeModel, make_pairs: MakePairs) -> None:
    with pytest.raises(InputError, match="there are no pairs"):
        Trainer(make_model(), make_pairs(0), PLAIN)


def test_evaluations_without_held_out_pairs_are_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    with pytest.raises(InputError, match=r"train\.eval_every needs held-out pairs: give"):
        Trainer(make_model(), make_pairs(), replace(PLAIN, eval_every=1))


def test_module_without_the_protocol_is_refused(make_pairs: MakePairs) -> None:
    with pytest.raises(InputError, match=r"Linear is no policy: it has no output_head\(\)"):
        Trainer(nn.Linear(2, 2), make_pairs(), PLAIN)


def test_column_that_the_loss_ignores_is_refused(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    pairs = columns_of([replace(pair, margin=0.3) for pair in make_pairs()])
    with pytest.raises(InputError, match="margin"):
        Trainer(make_model(), pairs, PLAIN, loss="sft")


def test_learning_rate_of_each_step_is_that_of_the_schedule(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, schedule="wsd", decay_share=0.6, warmup_steps=1)
    trainer = Trainer(make_model(), make_pairs(), config)
    rates = [step.metrics["learning_rate"] for step in trainer if step.metrics is not None]
    assert rates == pytest.approx([0, 1e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_other_momentum_is_refused_when_resuming(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, optimizer="muon")
    trainer = Trainer(make_model(), make_pairs(), config)
    other = Trainer(make_model(), make_pairs(), replace(config, momentum=0.9))
    with pytest.raises(InputError, match=r"momentum was 0\.95 and is 0\.9"):
        other.restore({}, trainer.state())


def test_other_share_of_wsd_is_refused_when_resuming(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, schedule="wsd")
    trainer = Trainer(make_model(), make_pairs(), config)
    other = Trainer(make_model(), make_pairs(), replace(config, decay_share=0.1))
    with pytest.raises(InputError, match=r"decay_share was 0\.2 and is 0\.1"):
        other.restore({}, trainer.state())


def test_rates_of_parameters_are_factors_on_the_rate_that_is_logged(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    """The first step of AdamW is the rate times the sign of the gradient, if there is any."""
    model = make_model()
    before = weights(model)
    config = replace(PLAIN, steps=1, rates={"embed_tokens": 0.5, r"norm\.weight": 0.25})
    (step,) = Trainer(model, make_pairs(), config)
    changes = {n: float((w - before[n]).abs().max()) for n, w in weights(model).items()}
    assert step.metrics is not None
    assert step.metrics["learning_rate"] == 1e-2
    assert changes["model.embed_tokens.weight"] == pytest.approx(0.5e-2, rel=1e-3)
    assert changes["model.norm.weight"] == pytest.approx(0.25e-2, rel=1e-3)
    assert changes["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-2, rel=1e-3)


def test_rate_of_no_parameter_is_refused(make_model: MakeModel, make_pairs: MakePairs) -> None:
    with pytest.raises(InputError, match=r"train\.rates: 'lm_head' finds no trained parameter"):
        Trainer(make_model(), make_pairs(), replace(PLAIN, rates={"lm_head": 0.5}))


@pytest.mark.parametrize("options", [{"ema_decay": 0.5}, {"optimizer": "schedule-free"}], ids=str)
def test_evaluation_is_of_the_average_and_leaves_training_as_it_is(
    make_model: MakeModel, make_pairs: MakePairs, options: dict[str, Any]
) -> None:
    held_out = make_pairs(4, seed=1)
    config = replace(PLAIN, **options)
    alone = Trainer(make_model(), make_pairs(), config)
    trainer = Trainer(
        make_model(), make_pairs(), replace(config, eval_every=1), eval_pairs=held_out
    )
    alone.train()
    *_, last = trainer
    for name, weight in weights(alone.module).items():
        assert torch.equal(weight, weights(trainer.module)[name])

    averaged = make_model()
    with trainer.averaged_weights():
        averaged.load_state_dict(trainer.module.state_dict())
    trainer.module.load_state_dict(averaged.state_dict())
    plain = Trainer(
        averaged, make_pairs(), PLAIN, eval_pairs=held_out, starts_at_reference=False,
        eval_reference=trainer.eval_batches.reference if trainer.eval_batches else None,
    )  # fmt: skip
    assert last.evaluation is not None
    assert plain.evaluate()["eval/loss"] == last.evaluation["eval/loss"]


def test_early_stopping_counts_evaluations_without_a_lower_loss(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    config = replace(PLAIN, steps=50, learning_rate=0.5, eval_every=1, early_stopping=2)
    trainer = Trainer(make_model(), make_pairs(4), config, eval_pairs=make_pairs(8, seed=9))
    losses = [step.evaluation["eval/loss"] for step in trainer if step.evaluation is not None]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 50
    assert trainer.best.step == best + 1


def test_callback_can_stop_the_run(make_model: MakeModel, make_pairs: MakePairs) -> None:
    def stop(trainer: Trainer, metrics: Mapping[str, float]) -> None:
        trainer.should_stop = metrics["step"] >= 2

    trainer = Trainer(make_model(), make_pairs(), PLAIN, callbacks=[stop])
    trainer.train()
    assert trainer.step == 2


@pytest.mark.parametrize("part", RECOMPUTED)
def test_parts_that_are_computed_again_give_bit_equal_weights(
    make_model: MakeModel, make_pairs: MakePairs, part: Recompute
) -> None:
    plain, saving = make_model(), make_model()
    recompute(saving, part)
    for model in (plain, saving):
        Trainer(model, make_pairs(), PLAIN).train()
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(saving)[name])


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones(make_model: MakeModel, make_pairs: MakePairs) -> None:
    torch._dynamo.reset()  # else graphs of earlier tests may be too many for another one
    eager, compiled = make_model(), make_model()
    compile_blocks(compiled)
    for model in (eager, compiled):
        Trainer(model, make_pairs(), PLAIN).train()
    for name, weight in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], weight, rtol=0, atol=1e-4)


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_host_reads_do_not_grow_with_micro_batches(
    make_model: MakeModel, make_pairs: MakePairs
) -> None:
    counts = []
    for micro_batch_size in (8, 1):
        config = replace(
            PLAIN,
            batch_size=8,
            micro_batch_size=micro_batch_size,
            tokens_per_micro_batch=None,
            log_every=5,
        )
        trainer = Trainer(make_model(), make_pairs(), config)
        trainer.train_step()
        with HostReads() as reads:
            trainer.train_step()
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_transformers_model_trains_like_ours(make_pairs: MakePairs, tmp_path: Any) -> None:
    import transformers

    from dpo.models import load_model

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    theirs.save_pretrained(tmp_path)
    losses = []
    for policy in (load_model(tmp_path), TransformersPolicy(theirs)):
        trainer = Trainer(policy, with_shared_prompts(make_pairs(), 3), PLAIN)
        losses.append([step.metrics["loss"] for step in trainer if step.metrics is not None])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_transformers_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no linear output layer"):
        TransformersPolicy(nn.Linear(2, 2))


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_next_step_is_put_together_before_the_host_waits_for_this_one(
    make_model: MakeModel,
    make_pairs: MakePairs,
    monkeypatch: pytest.MonkeyPatch,
    micro_batch_size: int,
) -> None:
    config = TrainConfig(batch_size=4, micro_batch_size=micro_batch_size, steps=3)
    trainer = Trainer(make_model(), make_pairs(), config, starts_at_reference=False)
    events: list[str] = []
    collate, is_finite = MicroBatches.collate, Trainer._is_finite

    def told_collate(batches: MicroBatches, rows: Any, *, step: int = 0) -> PairBatch:
        events.append(f"step {step}")
        return collate(batches, rows, step=step)

    def told_wait(trainer: Trainer, *arguments: Tensor) -> bool:
        events.append("wait")
        return is_finite(trainer, *arguments)

    monkeypatch.setattr(MicroBatches, "collate", told_collate)
    monkeypatch.setattr(Trainer, "_is_finite", told_wait)
    trainer.train()
    rest = [4 // micro_batch_size - 1] * 3
    expected = ["step 1"]
    for step, more in enumerate(rest, 1):
        ahead = [f"step {step + 1}"] if step < 3 else []
        expected += [*[f"step {step}"] * more, *ahead, "wait"]
    assert events == expected
