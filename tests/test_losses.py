"""Every loss of the table against its paper's closed form, and what all of them must hold to."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo.errors import InputError
from dpo.losses import LOSSES, CustomLoss, Loss, PairLogProbs, ReferenceLoss, make_loss
from dpo.losses.with_reference import DpoShift
from dpo.tokenized_pairs import TokenizedPair, columns_of

LN2 = math.log(2)

# Values of the two golden pairs, computed in float64 from the papers' formulas by another program.
GOLDEN: list[tuple[str, dict[str, float | str], list[float]]] = [
    ("sigmoid", {"beta": 0.1}, [0.598139, 0.825939]),
    ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, [0.618139, 0.800939]),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, [0.573139, 0.857189]),
    ("hinge", {"beta": 0.1}, [0.8, 1.25]),
    ("ipo", {"beta": 0.1}, [21.467778, 27.957656]),
    ("ipo_sum", {"beta": 0.1}, [9, 56.25]),
    ("sigmoid_norm", {"beta": 0.1}, [0.674982, 0.707625]),
    ("sigmoid_norm", {"beta": 5.0}, [0.148316, 1.650610]),
    ("rpo", {"beta": 0.1, "alpha": 1.0}, [2.998139, 3.825939]),
    ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, [2.422015, 3.198420]),
    ("nca_pair", {"beta": 0.1}, [1.338793, 1.452074]),
    ("sppo_hard", {"beta": 0.1}, [32, 78.25]),
    ("apo_zero", {"beta": 0.1}, [0.950042, 1.062409]),
    ("apo_down", {"beta": 0.1}, [0.975145, 1.037197]),
    ("discopop", {"beta": 0.1, "tau": 0.05}, [0.814763, 0.829005]),
    ("chi_po", {"beta": 0.1, "reward_bound": 2.5}, [0.499100, 1.077547]),
    ("r_dpo", {"beta": 0.1, "alpha": 0.01}, [0.602653, 0.814745]),
    ("dpop", {"beta": 0.1, "penalty": 5.0}, [0.598139, 1.136871]),
    ("dpop", {"beta": 0.1, "penalty": 50.0}, [0.598139, 5.255234]),
    ("cal_dpo", {"beta": 0.1}, [16.126928, 41.703890]),
    ("dpo_shift", {"beta": 0.1, "rejected_weight": 0.95}, [0.600393, 0.821730]),
    ("f_dpo", {"beta": 0.1, "divergence": "reverse_kl"}, [0.598139, 0.825939]),
    ("f_dpo", {"beta": 0.1, "divergence": "forward_kl"}, [0.582517, 0.825667]),
    ("f_dpo", {"beta": 0.1, "divergence": "jensen_shannon"}, [0.644397, 0.750284]),
    ("f_dpo", {"beta": 0.1, "divergence": "alpha", "alpha": 0.5}, [0.594349, 0.817686]),
    ("sft", {}, [2.4, 3.0]),
    ("reference_free", {"beta": 0.1}, [0.554355, 0.798139]),
    ("cpo", {"beta": 0.1, "alpha": 0.0}, [0.554355, 0.798139]),
    ("cpo", {"beta": 0.1, "alpha": 1.0}, [2.954355, 3.798139]),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, [1.171101, 0.693147]),
    ("alpha_po", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}, [0.528738, 0.063873]),
    ("orpo", {"beta": 0.1}, [2.463992, 3.046642]),
    ("slic_hf", {"delta": 1.0, "nll_weight": 0.1}, [1.2, 6.0]),
    ("simper", {}, [-0.008633, -0.019590]),
    # sorted policy margins -2, 3 against 0.5, 1; sorted u -1, 1 against v -1, 1.5
    ("aot", {"beta": 0.1}, [0.598139, 0.825939]),
    ("aot_unpaired", {"beta": 0.1}, [0.718460, 0.693147]),
    ("dr_dpo", {"beta": 0.1, "robustness": 1.0}, [0.705566, 0.705566]),
    ("alpha_dpo", {"beta": 2.0, "gamma_ratio": 0.5, "alpha": 0.0}, [1.171101, 0.693147]),
    ("beta_dpo", {"beta": 0.1, "alpha": 0.0, "keep": 1.0}, [0.598139, 0.825939]),
    ("bco", {"beta": 0.1}, [1.288793, 1.515354]),
    ("kto", {"beta": 0.1}, [0.478139 + 0.471905, 0.528095 + 0.534321]),
    # 1 - s(0.075) + 1 - s(0.1) and 1 - s(-0.125) + 1 - s(-0.15)
    ("kto_pair", {"beta": 0.1}, [0.956280, 1.068639]),
    # those of single tokens are DPO on log-probs that are summed as they are
    ("ld_dpo", {"beta": 0.1}, [0.598139, 0.825939]),
    ("sampo", {"beta": 0.1}, [0.598139, 0.825939]),
    ("humanline", {"beta": 0.1}, [0.598139, 0.825939]),
    ("wpo", {"beta": 0.1}, [0.598139, 0.825939]),
    ("tdpo1", {"beta": 0.1}, [0.598139, 0.825939]),
    ("tdpo2", {"beta": 0.1}, [0.598139, 0.825939]),
    ("plackett_luce", {"beta": 0.1}, [0.598139, 0.825939]),  # of chains of one pair
]

EXO_START = 0.5 * (-LN2 - math.log1p(-1e-3)) + 0.5 * (-LN2 - math.log(1e-3))

# Where the policy is the reference, at equal lengths.
START: dict[str, float] = {
    "sigmoid": LN2,
    "robust": LN2,
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.1**2),
    "ipo_sum": 1 / (4 * 0.1**2),
    "sigmoid_norm": LN2,
    "exo_pair": EXO_START,
    "nca_pair": 2 * LN2,
    "sppo_hard": 1 / (2 * 0.001**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * (LN2 + 1),
    "chi_po": LN2,
    "r_dpo": LN2,
    "dpop": LN2,
    "cal_dpo": LN2 + 1 / (4 * 0.001**2),
    "dpo_shift": LN2,
    "f_dpo": LN2,
    "ld_dpo": LN2,
    "sampo": LN2,
    "humanline": LN2,
    "wpo": LN2,
    "tdpo1": LN2,
    "tdpo2": LN2,
    "aot": LN2,
    "aot_unpaired": LN2,
    "dr_dpo": LN2,
    "kto": 1.0,
    "kto_pair": 1.0,
    "bco": 2 * LN2,
    "plackett_luce": LN2,
}
NO_START = {"rpo", "alpha_dpo", "beta_dpo", "odpo"}  # each has a test of its own
WITH_REFERENCE = [name for name, entry in LOSSES.items() if entry.needs_reference]
REFERENCE_FREE = [name for name, entry in LOSSES.items() if not entry.needs_reference]
READS_MARGIN = [name for name, entry in LOSSES.items() if "margin" in entry.reads]
READS_LABEL_PROB = [name for name, entry in LOSSES.items() if "label_prob" in entry.reads]
IGNORES_MARGIN = [name for name in LOSSES if name not in READS_MARGIN]
IGNORES_LABEL_PROB = [name for name in LOSSES if name not in READS_LABEL_PROB]

# Each loss that only ever gets smaller as chosen rises or rejected falls.
MONOTONE: list[tuple[str, dict[str, float | str]]] = [
    ("sigmoid", {}),
    ("robust", {}),
    ("hinge", {}),
    ("apo_zero", {}),
    ("sigmoid_norm", {}),
    ("rpo", {}),
    ("r_dpo", {}),
    ("dpop", {}),
    ("dpo_shift", {}),
    ("f_dpo", {"divergence": "forward_kl"}),
    ("f_dpo", {"divergence": "jensen_shannon"}),
    ("f_dpo", {"divergence": "alpha"}),
    ("reference_free", {}),
    ("simpo", {}),
    ("alpha_po", {}),
    ("cpo", {}),
    ("orpo", {}),
    ("slic_hf", {}),
    ("simper", {}),
    ("wpo", {}),
    ("tdpo1", {}),
    ("aot", {}),
    ("aot_unpaired", {}),
    ("dr_dpo", {}),
    ("bco", {}),
    ("kto", {}),
    ("kto_pair", {}),
    ("beta_dpo", {}),
    ("alpha_dpo", {}),
    ("plackett_luce", {}),
]
# Their values depend on log-probs by ways that have no gradient.
STOPS_GRADIENT = {"beta_dpo", "alpha_dpo", "kto_pair"}


def column(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.fixture
def pairs() -> PairLogProbs:
    """The golden pairs: u = [1, -1], v = [-1, 1.5], D = [2, -2.5]."""
    return PairLogProbs(
        chosen=column(-12, -30),
        rejected=column(-15, -28),
        reference_chosen=column(-13, -29),
        reference_rejected=column(-14, -29.5),
        chosen_tokens=column(5, 10),
        rejected_tokens=column(6, 8),
        weight=column(1, 1),
        margin=column(0, 0),
        label_prob=column(1, 1),
        draw=column(0.5, 0.5),
        chain=torch.arange(2),
        mismatch=torch.tensor(0.125, dtype=torch.float64),
        running=column(0, 0),
    )


def random_pairs(seed: int, count: int = 6) -> PairLogProbs:
    """Pairs with no log-ratio near 0, where dpop has a corner."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        unit = torch.rand(count, generator=generator, dtype=torch.float64)
        return low + (high - low) * unit

    return PairLogProbs(
        chosen=uniform(-30, -20),
        rejected=uniform(-30, -20),
        reference_chosen=uniform(-19, -15),
        reference_rejected=uniform(-19, -15),
        chosen_tokens=uniform(5, 10).round(),
        rejected_tokens=uniform(5, 10).round(),
        weight=uniform(0, 2),
        margin=uniform(0, 1),
        label_prob=uniform(0.6, 1),
        draw=uniform(0, 1),
        chain=torch.arange(count),
        running=column(0, 0),
    )


def gradients(loss: Loss, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """Gradient of the summed loss in chosen and in rejected, (P,) each."""
    chosen = pairs.chosen.clone().requires_grad_()
    rejected = pairs.rejected.clone().requires_grad_()
    loss(replace(pairs, chosen=chosen, rejected=rejected)).sum().backward()
    zero = torch.zeros_like(chosen)
    of_chosen, of_rejected = chosen.grad, rejected.grad
    return (
        zero if of_chosen is None else of_chosen,
        zero if of_rejected is None else of_rejected,
    )


def with_log_ratios(pairs: PairLogProbs, u: Tensor, v: Tensor) -> PairLogProbs:
    return replace(pairs, chosen=pairs.reference_chosen + u, rejected=pairs.reference_rejected + v)


# Values


@pytest.mark.parametrize(("name", "options", "values"), GOLDEN)
def test_value_is_the_papers(
    name: str, options: dict[str, float | str], values: list[float], pairs: PairLogProbs
) -> None:
    assert make_loss(name, **options)(pairs).tolist() == pytest.approx(values, abs=6e-7)


def test_every_loss_has_a_golden_value() -> None:
    assert {*(name for name, _, _ in GOLDEN), "odpo"} == set(LOSSES)


def test_odpo_has_its_golden_value(pairs: PairLogProbs) -> None:
    apart = replace(pairs, margin=column(1, 0.5))
    assert make_loss("odpo")(apart).tolist() == pytest.approx([0.598139, 0.495923], abs=6e-7)


def test_bco_measures_from_the_mean_of_its_rewards(pairs: PairLogProbs) -> None:
    shifted = replace(pairs, running=column(0.1, 2))  # a sum of two rewards
    assert make_loss("bco")(shifted).tolist() == pytest.approx([1.289417, 1.515354], abs=6e-7)


def test_soft_label_has_its_golden_value(pairs: PairLogProbs) -> None:
    soft = replace(pairs, label_prob=column(0.8, 0.8))
    assert make_loss("sigmoid")(soft).tolist() == pytest.approx([0.638139, 0.775939], abs=6e-7)


def test_margin_has_its_golden_value(pairs: PairLogProbs) -> None:
    apart = replace(pairs, margin=column(0.3, 0.3))
    assert make_loss("sigmoid")(apart).tolist() == pytest.approx([0.744397, 1.005492], abs=6e-7)


def test_sft_over_a_step_is_the_mean_over_chosen_tokens(pairs: PairLogProbs) -> None:
    """(12 + 30) / 15 = 2.8."""
    loss = make_loss("sft")
    weights = loss.pair_weights(pairs)
    assert (weights * loss(pairs)).sum() / weights.sum() == pytest.approx(2.8)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])
def test_weight_of_a_pair_is_its_row_weight(name: str, pairs: PairLogProbs) -> None:
    weighted = replace(pairs, weight=column(0.5, 3))
    assert make_loss(name).pair_weights(weighted).tolist() == [0.5, 3]


def test_sft_weighs_a_pair_by_weight_and_tokens(pairs: PairLogProbs) -> None:
    weighted = replace(pairs, weight=column(0.5, 3))
    assert make_loss("sft").pair_weights(weighted).tolist() == [2.5, 30]


@pytest.mark.parametrize("name", START)
def test_value_at_the_reference_is_the_closed_form(name: str, pairs: PairLogProbs) -> None:
    equally_long = replace(pairs, chosen_tokens=column(7, 7), rejected_tokens=column(7, 7))
    assert make_loss(name).at_reference(equally_long).tolist() == pytest.approx([START[name]] * 2)


def test_every_loss_with_a_reference_has_a_start_value() -> None:
    assert {*START, *NO_START} == set(WITH_REFERENCE)


def test_rpo_starts_at_ln2_and_the_references_nll(pairs: PairLogProbs) -> None:
    """Ln 2 + 13/5 and ln 2 + 29/10."""
    assert make_loss("rpo").at_reference(pairs).tolist() == pytest.approx([LN2 + 2.6, LN2 + 2.9])


def test_values_per_token_of_an_empty_answer_stay_finite(pairs: PairLogProbs) -> None:
    empty = replace(pairs, chosen=column(0, 0), chosen_tokens=column(0, 0))
    assert empty.per_token().chosen.tolist() == [0, 0]


# Limits in which one loss is another


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("f_dpo", {"divergence": "reverse_kl"}),
        ("f_dpo", {"divergence": "alpha", "alpha": 1 - 1e-9}),
        ("rpo", {"alpha": 0.0}),
        ("r_dpo", {"alpha": 0.0}),
        ("dpop", {"beta": 0.1, "penalty": 0.0}),
        ("dpo_shift", {"rejected_weight": 1.0}),
        ("robust", {"label_smoothing": 0.0}),
    ],
)
def test_loss_without_its_addition_is_dpo(name: str, options: dict[str, float | str]) -> None:
    pairs = replace(random_pairs(0), label_prob=torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(
        make_loss(name, **options)(pairs), make_loss("sigmoid")(pairs), rtol=1e-7, atol=1e-7
    )


def test_alpha_divergence_towards_zero_is_the_forward_kl(pairs: PairLogProbs) -> None:
    torch.testing.assert_close(
        make_loss("f_dpo", divergence="alpha", alpha=1e-9)(pairs),
        make_loss("f_dpo", divergence="forward_kl")(pairs),
    )


def test_alpha_po_towards_zero_is_simpo(pairs: PairLogProbs) -> None:
    torch.testing.assert_close(
        make_loss("alpha_po", beta=2.0, gamma=1.0, alpha=1e-9)(pairs),
        make_loss("simpo", beta=2.0, gamma=1.0)(pairs),
    )


def test_label_smoothing_is_the_same_label_prob_in_every_row(pairs: PairLogProbs) -> None:
    torch.testing.assert_close(
        make_loss("sigmoid", label_smoothing=0.2)(pairs),
        make_loss("sigmoid")(replace(pairs, label_prob=column(0.8, 0.8))),
    )


# Losses that change over a run


@pytest.mark.parametrize(("first", "last"), [(0.75, 1.0), (1.0, 0.75)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_lambda_of_dpo_shift_moves_in_a_straight_line(
    first: float, last: float, share: float, pairs: PairLogProbs
) -> None:
    moving = make_loss("dpo_shift", rejected_weight=first, final_rejected_weight=last)
    fixed = make_loss("dpo_shift", rejected_weight=first + share * (last - first))
    torch.testing.assert_close(moving.at_progress(share)(pairs), fixed(pairs))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_that_is_not_told_to_change_is_the_same_all_along(name: str) -> None:
    loss = make_loss(name)
    assert loss.at_progress(0.5) is loss


def test_terms_of_a_mixture_change_as_they_do_alone(pairs: PairLogProbs) -> None:
    mixture = make_loss("dpo_shift:0.5,sft:2", rejected_weight=1.0, final_rejected_weight=0.5)
    expected = make_loss("dpo_shift:0.5,sft:2", rejected_weight=0.75)
    assert mixture.at_progress(0.5)(pairs).equal(expected(pairs))


# What all must hold to


@pytest.mark.parametrize("name", WITH_REFERENCE)
@given(shift=st.floats(min_value=-50, max_value=50), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_adding_a_constant_to_policy_and_reference_changes_nothing(
    name: str, shift: float, seed: int
) -> None:
    pairs = random_pairs(seed)
    shifted = replace(
        pairs,
        chosen=pairs.chosen + shift,
        reference_chosen=pairs.reference_chosen + shift,
    )
    expected = make_loss(name)(pairs)
    if name == "rpo":
        expected = expected - shift / pairs.chosen_tokens  # its NLL term has no reference
    if name == "alpha_dpo":
        return  # it is SimPO, whose logit has none either
    torch.testing.assert_close(make_loss(name)(shifted), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_loss_without_a_reference_does_not_read_it(name: str) -> None:
    pairs = random_pairs(0)
    other = replace(
        pairs, reference_chosen=pairs.reference_chosen * 2, reference_rejected=-pairs.rejected
    )
    assert make_loss(name)(pairs).equal(make_loss(name)(other))
    assert make_loss(name).rewards(pairs)[0].equal(make_loss(name).rewards(other)[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LOSSES),
        *((name, {"beta": 1.0}) for name in LOSSES if hasattr(LOSSES[name], "beta")),
        ("sigmoid", {"label_smoothing": 0.1}),
        ("f_dpo", {"divergence": "forward_kl", "beta": 1.0}),
        ("f_dpo", {"divergence": "alpha", "beta": 1.0}),
        ("discopop", {"tau": 2.0, "beta": 1.0}),
    ],
)
def test_value_and_gradient_stay_finite_at_extremes(
    name: str, options: dict[str, float | str]
) -> None:
    loss = make_loss(name, **options)
    extremes = [-1e4, -100.0, -80.0, -1.0, -0.0, 1.0, 80.0, 100.0, 1e4]
    u, v = torch.cartesian_prod(torch.tensor(extremes), torch.tensor(extremes)).unbind(1)
    one, zero = torch.ones_like(u), torch.zeros_like(u)
    reference = zero - 1e4 - 100
    pairs = PairLogProbs(
        chosen=reference + u,
        rejected=reference + v,
        reference_chosen=reference,
        reference_rejected=reference,
        chosen_tokens=one * 7,
        rejected_tokens=one * 5,
        weight=one,
        margin=one if name == "odpo" else zero,
        label_prob=one,
        draw=one / 2,
        chain=torch.arange(len(u)),
        running=torch.zeros(2),
    )
    assert pairs.chosen.dtype == torch.float32
    assert loss(pairs).isfinite().all()
    of_chosen, of_rejected = gradients(loss, pairs)
    assert of_chosen.isfinite().all()
    assert of_rejected.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_stay_finite_for_a_certain_policy(name: str) -> None:
    """Log-probs of exactly 0 in float32: a memorised answer."""
    pairs = random_pairs(0, count=1)
    pairs = PairLogProbs(*(getattr(pairs, field.name).float() for field in fields(pairs)))
    certain = replace(pairs, chosen=torch.zeros(1), rejected=torch.zeros(1))
    loss = make_loss(name)
    assert loss(certain).isfinite().all()
    assert torch.cat(gradients(loss, certain)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LOSSES if name not in STOPS_GRADIENT),
        ("sigmoid", {"label_smoothing": 0.1}),
        ("f_dpo", {"divergence": "forward_kl", "beta": 0.01}),
        ("f_dpo", {"divergence": "alpha"}),
    ],
)
def test_gradient_equals_finite_differences(name: str, options: dict[str, float | str]) -> None:
    pairs = random_pairs(1)
    loss = make_loss(name, **options)

    def value(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(replace(pairs, chosen=chosen, rejected=rejected))

    inputs = (pairs.chosen.clone().requires_grad_(), pairs.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize(("name", "options"), MONOTONE)
@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_gradient_raises_chosen_and_lowers_rejected(
    name: str, options: dict[str, float | str], seed: int
) -> None:
    pairs = replace(random_pairs(seed), label_prob=torch.ones(6, dtype=torch.float64))
    of_chosen, of_rejected = gradients(make_loss(name, **options), pairs)
    assert (of_chosen <= 0).all()
    assert (of_rejected >= 0).all()


def test_apo_down_lowers_both(pairs: PairLogProbs) -> None:
    """At u = 1, v = -1: s'(beta u) > s'(beta D), as s' falls with distance from 0."""
    of_chosen, of_rejected = gradients(
        make_loss("apo_down"), with_log_ratios(pairs, column(1, 2), column(-1, -5))
    )
    assert (of_chosen > 0).all()
    assert (of_rejected > 0).all()


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@pytest.mark.parametrize(
    ("name", "options", "u", "v"),
    [
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.2}, logit(0.8) / 0.1, 0.0),
        ("exo_pair", {"beta": 0.1, "label_smoothing": 0.1}, logit(0.9) / 0.1, 0.0),
        ("ipo_sum", {"beta": 0.1}, 4.0, -1.0),
        ("sppo_hard", {"beta": 0.1}, 5.0, -5.0),
    ],
)
def test_gradient_vanishes_at_the_target(
    name: str, options: dict[str, float | str], u: float, v: float, pairs: PairLogProbs
) -> None:
    at_target = with_log_ratios(pairs, column(u, u), column(v, v))
    for gradient in gradients(make_loss(name, **options), at_target):
        assert gradient.tolist() == pytest.approx([0, 0], abs=1e-9)


def test_nca_stops_raising_chosen_at_two_thirds(pairs: PairLogProbs) -> None:
    """The derivative in x = beta u is (3 s(x) - 2) / 2."""
    loss = make_loss("nca_pair", beta=0.1)
    around = column(logit(2 / 3) / 0.1 - 0.1, logit(2 / 3) / 0.1 + 0.1)
    of_chosen, _ = gradients(loss, with_log_ratios(pairs, around, column(0, 0)))
    assert of_chosen[0] < 0 < of_chosen[1]


def test_cal_dpo_pulls_chosen_back_beyond_its_target(pairs: PairLogProbs) -> None:
    """Target u = 1 / (2 beta) = 5; at u = 10, v = -10 the squared terms dominate."""
    of_chosen, of_rejected = gradients(
        make_loss("cal_dpo", beta=0.1), with_log_ratios(pairs, column(10, 0), column(-10, 0))
    )
    assert of_chosen[0] > 0 > of_chosen[1]
    assert of_rejected[0] < 0 < of_rejected[1]


# Columns


@pytest.mark.parametrize("name", READS_MARGIN)
def test_margin_that_is_read_moves_the_loss(name: str) -> None:
    pairs = random_pairs(2)
    margin = pairs.margin.clone().requires_grad_()
    make_loss(name)(replace(pairs, margin=margin)).sum().backward()
    assert margin.grad is not None
    assert (margin.grad != 0).any()


PER_TOKEN = {"ipo", "sigmoid_norm", "simpo"}
# These scale the log-ratio by more than beta, or the margin by a function.
NOT_LINEAR = {"chi_po", "alpha_po", "f_dpo", "odpo", "alpha_dpo", "beta_dpo"}


@pytest.mark.parametrize("name", [name for name in READS_MARGIN if name not in NOT_LINEAR])
def test_margin_lowers_the_logit_as_a_likelier_rejected_answer_does(name: str) -> None:
    """The logit falls by beta (rejected_weight, 1 / n_l) for each nat of the rejected answer."""
    pairs, options = random_pairs(3), {"beta": 0.5}
    per_nat = torch.full_like(pairs.weight, 0.5)
    if name == "dpo_shift":
        per_nat = per_nat * DpoShift.rejected_weight
    if name == "slic_hf":
        per_nat, options = torch.ones_like(per_nat), {}
    if name in PER_TOKEN:
        per_nat = per_nat / pairs.rejected_tokens
    moved = replace(
        pairs,
        rejected=pairs.rejected + pairs.margin / per_nat,
        margin=torch.zeros_like(pairs.margin),
    )
    loss = make_loss(name, **options)
    torch.testing.assert_close(loss(pairs), loss(moved))


@pytest.mark.parametrize("name", IGNORES_MARGIN)
def test_margin_that_is_not_read_changes_nothing(name: str) -> None:
    pairs = random_pairs(2)
    assert make_loss(name)(pairs).equal(make_loss(name)(replace(pairs, margin=pairs.margin * 2)))


@pytest.mark.parametrize("name", IGNORES_LABEL_PROB)
def test_label_prob_that_is_not_read_changes_nothing(name: str) -> None:
    pairs = random_pairs(2)
    other = replace(pairs, label_prob=pairs.label_prob / 2)
    assert make_loss(name)(pairs).equal(make_loss(name)(other))


@pytest.mark.parametrize("name", [name for name in READS_LABEL_PROB if name != "dr_dpo"])
def test_loss_is_linear_in_label_prob(name: str) -> None:
    pairs, loss = random_pairs(4), make_loss(name)

    def at(probability: float) -> Tensor:
        return loss(replace(pairs, label_prob=torch.full_like(pairs.weight, probability)))

    torch.testing.assert_close(at(0.7), 0.7 * at(1.0) + 0.3 * at(0.0))


def test_label_prob_zero_is_the_pair_the_other_way_round(pairs: PairLogProbs) -> None:
    swapped = replace(
        pairs,
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        reference_chosen=pairs.reference_rejected,
        reference_rejected=pairs.reference_chosen,
    )
    torch.testing.assert_close(
        make_loss("sigmoid")(replace(pairs, label_prob=column(0, 0))), make_loss("sigmoid")(swapped)
    )


def check(
    loss: Loss,
    *,
    margin: float = 0.0,
    label_prob: float = 1.0,
    weight: float = 1.0,
    is_unpaired: bool = False,
) -> None:
    """Let a loss look at three pairs of which the last one says something."""
    usual = 1.0 if "odpo" in repr(loss).lower() else 0.0
    token, nothing = np.zeros(1, np.int32), np.zeros(0, np.int32)
    plain = TokenizedPair(token, token, token + 1, margin=usual)
    last = replace(
        plain,
        margin=margin or usual,
        label_prob=label_prob,
        weight=weight,
        rejected_ids=nothing if is_unpaired else token + 1,
    )
    loss.check(columns_of([plain, plain, last]))


@pytest.mark.parametrize("name", LOSSES)
def test_data_that_says_nothing_is_accepted(name: str) -> None:
    check(make_loss(name))


@pytest.mark.parametrize("name", READS_MARGIN)
def test_margin_that_is_read_is_accepted(name: str) -> None:
    check(make_loss(name), margin=0.5)


@pytest.mark.parametrize("name", READS_LABEL_PROB)
def test_label_prob_that_is_read_is_accepted(name: str) -> None:
    check(make_loss(name), label_prob=0.5)


@pytest.mark.parametrize("name", IGNORES_MARGIN)
def test_margin_that_is_not_read_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"1 pairs have a margin \(the first is pair 2\), which"):
        check(make_loss(name), margin=0.5)


@pytest.mark.parametrize("name", IGNORES_LABEL_PROB)
def test_label_prob_that_is_not_read_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"have a label_prob .* remove the column or choose"):
        check(make_loss(name), label_prob=0.5)


def test_label_smoothing_and_label_prob_together_are_refused() -> None:
    with pytest.raises(InputError, match=r"loss\.label_smoothing=0\.1 and .* label_prob column"):
        check(make_loss("sigmoid", label_smoothing=0.1), label_prob=0.5)


# Rewards


@pytest.mark.parametrize(
    "name", [n for n in WITH_REFERENCE if n not in {"f_dpo", "chi_po", "alpha_dpo"}]
)
def test_rewards_are_beta_times_the_log_ratios(name: str, pairs: PairLogProbs) -> None:
    chosen, rejected = make_loss(name, beta=0.5).rewards(pairs)
    assert (chosen.tolist(), rejected.tolist()) == ([0.5, -0.5], [-0.5, 0.75])


@pytest.mark.parametrize(
    ("name", "options", "chosen", "rejected"),
    [
        ("reference_free", {"beta": 0.5}, [-6, -15], [-7.5, -14]),
        ("cpo", {"beta": 0.5}, [-6, -15], [-7.5, -14]),
        ("simpo", {"beta": 2.0}, [-4.8, -6], [-5, -7]),
        ("orpo", {"beta": 0.5}, [-1.2, -1.5], [-1.25, -1.75]),
        ("sft", {}, [-12, -30], [-15, -28]),
        ("slic_hf", {}, [-12, -30], [-15, -28]),
        ("simper", {}, [-2.4, -3], [-2.5, -3.5]),
    ],
)
def test_rewards_without_a_reference_are_scaled_log_probs(
    name: str,
    options: dict[str, float | str],
    chosen: list[float],
    rejected: list[float],
    pairs: PairLogProbs,
) -> None:
    rewards = make_loss(name, **options).rewards(pairs)
    assert [reward.tolist() for reward in rewards] == [
        pytest.approx(chosen),
        pytest.approx(rejected),
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("f_dpo", {"divergence": "forward_kl"}),
        ("f_dpo", {"divergence": "jensen_shannon"}),
        ("chi_po", {}),
        ("simpo", {"gamma": 0.0}),
        ("alpha_po", {"gamma": 0.0}),
    ],
)
def test_loss_is_the_logistic_loss_of_its_rewards(
    name: str, options: dict[str, float | str], pairs: PairLogProbs
) -> None:
    loss = make_loss(name, **options)
    chosen, rejected = loss.rewards(pairs)
    torch.testing.assert_close(loss(pairs), (1 + (rejected - chosen).exp()).log())


# Making one


@pytest.mark.parametrize("name", LOSSES)
def test_name_makes_the_loss_with_its_defaults(name: str) -> None:
    assert make_loss(name) == LOSSES[name]()


@pytest.mark.parametrize("name", LOSSES)
def test_docstring_names_the_paper_or_is_of_the_field(name: str) -> None:
    documentation = LOSSES[name].__doc__ or ""
    assert "arXiv:" in documentation or name in {"sft", "reference_free"}


def test_options_cannot_be_changed() -> None:
    loss = make_loss("sigmoid")
    with pytest.raises(FrozenInstanceError):
        loss.beta = 1.0  # type: ignore[attr-defined]  # the point of the test


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'sigmod'; did you mean 'sigmoid'\?.*hinge"):
        make_loss("sigmod")


def test_name_like_no_other_is_refused_with_the_list() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'qqq'; There are: sigmoid, robust"):
        make_loss("qqq")


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_option_is_refused_with_the_losss_own(name: str) -> None:
    own = ", ".join(field.name for field in fields(LOSSES[name])) or "none"
    with pytest.raises(InputError, match=f"loss {name} has no option 'nonsense'; it has: {own}"):
        make_loss(name, nonsense=1.0)


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("sigmoid", "beta", 0.0, r"loss\.beta must be a number in \(0, inf\), got 0\.0"),
        ("sigmoid", "beta", math.inf, r"loss\.beta must be .* got inf"),
        ("sigmoid", "beta", math.nan, r"loss\.beta must be .* got nan"),
        ("sigmoid", "beta", "high", r"loss\.beta must be .* got 'high'"),
        ("sigmoid", "beta", True, r"loss\.beta must be .* got True"),
        ("sigmoid", "label_smoothing", 0.6, r"loss\.label_smoothing must be a number in \[0, 0.5]"),
        ("robust", "label_smoothing", 0.5, r"must be a number in \[0, 0\.5\), got 0\.5"),
        ("exo_pair", "label_smoothing", 0.0, r"must be a number in \(0, 0\.5\), got 0\.0"),
        ("dpo_shift", "rejected_weight", 1.1, r"must be a number in \(0, 1], got 1\.1"),
        ("dpo_shift", "final_rejected_weight", 0.0, r"must be a number in \(0, 1], got 0\.0"),
        ("rpo", "alpha", -1.0, r"must be a number in \[0, inf\), got -1\.0"),
        ("f_dpo", "divergence", "tv", r"loss\.divergence must be one of reverse_kl, .* got 'tv'"),
        ("f_dpo", "alpha", 0.5, r"loss\.alpha is read only with loss\.divergence='alpha'"),
    ],
)
def test_option_out_of_range_is_refused(
    name: str, option: str, value: float | str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_loss(name, **{option: value})


# A caller's own


def squared(pairs: PairLogProbs, *, beta: float = 0.3, target: float = 1.0) -> Tensor:
    return (beta * pairs.log_ratio_gap - target).square()


class Shifted(ReferenceLoss):
    def __call__(self, pairs: PairLogProbs) -> Tensor:
        return pairs.log_ratio_gap


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module on the path with a function, a loss and something else."""
    name = "a_users_losses"
    (tmp_path / f"{name}.py").write_text(
        "from dpo.losses import make_loss\n"
        "def gap(pairs, scale=1.0):\n    return scale * pairs.log_ratio_gap\n"
        "loss = make_loss('hinge')\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_function_becomes_a_loss_with_defaults(pairs: PairLogProbs) -> None:
    loss = make_loss(squared, target=2.0)
    assert loss(pairs).tolist() == pytest.approx([(0.6 - 2) ** 2, (-0.75 - 2) ** 2])
    assert loss.pair_weights(pairs).equal(pairs.weight)
    assert loss.needs_reference
    check(loss, margin=0.5, label_prob=0.5)


def test_rewards_of_a_function_use_its_beta(pairs: PairLogProbs) -> None:
    assert make_loss(squared).rewards(pairs)[0].tolist() == pytest.approx([0.3, -0.3])
    assert make_loss(squared, beta=2.0).rewards(pairs)[0].tolist() == [2, -2]


def test_rewards_of_a_function_without_beta_use_dpos(pairs: PairLogProbs) -> None:
    def gap(pairs: PairLogProbs) -> Tensor:
        return pairs.log_ratio_gap

    assert make_loss(gap).rewards(pairs)[0].tolist() == pytest.approx([0.1, -0.1])


def test_class_of_losses_is_made_with_its_options() -> None:
    assert make_loss(Shifted, beta=0.7) == Shifted(beta=0.7)


def test_loss_is_returned_as_it_is() -> None:
    loss = make_loss("hinge", beta=0.7)
    assert make_loss(loss) is loss


def test_loss_that_is_made_takes_no_options() -> None:
    with pytest.raises(InputError, match="loss Hinge has no option 'beta'; it has: none"):
        make_loss(make_loss("hinge"), beta=1.0)


def test_function_is_found_by_module_and_name(user_module: str, pairs: PairLogProbs) -> None:
    loss = make_loss(f"{user_module}:gap", scale=2.0)
    assert loss(pairs).tolist() == [4, -5]


def test_loss_is_found_by_module_and_name(user_module: str) -> None:
    assert make_loss(f"{user_module}:loss") == make_loss("hinge")


def test_unknown_option_of_a_function_is_refused_with_its_own(user_module: str) -> None:
    with pytest.raises(InputError, match=r"gap: .* 'beta'; its options are: scale"):
        make_loss(f"{user_module}:gap", beta=0.1)


def test_option_that_a_function_needs_is_asked_for() -> None:
    def scaled(pairs: PairLogProbs, scale: float) -> Tensor:
        return scale * pairs.log_ratio_gap

    with pytest.raises(InputError, match="loss scaled: missing a required argument: 'scale'"):
        make_loss(scaled)


def test_function_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="too many positional arguments; its options are: none"):
        make_loss(lambda: torch.zeros(2))


def test_module_that_is_absent_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot import the loss 'nowhere\.at:all'.*PYTHONPATH"):
        make_loss("nowhere.at:all")


def test_module_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match="cannot import the loss ':gap'"):
        make_loss(":gap")


def test_function_that_is_absent_is_refused(user_module: str) -> None:
    with pytest.raises(InputError, match=f"module '{user_module}' has no 'gone'"):
        make_loss(f"{user_module}:gone")


def test_what_is_no_function_is_refused(user_module: str) -> None:
    with pytest.raises(InputError, match="must be a function of PairLogProbs, got int"):
        make_loss(f"{user_module}:number")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda pairs: pairs.chosen.mean(), r"got \(\)"),
        (lambda pairs: pairs.chosen[:1], r"got \(1,\)"),
        (lambda pairs: 1.0, "got float"),
    ],
)
def test_function_that_does_not_return_a_value_per_pair_is_refused(
    function: Callable[[PairLogProbs], Tensor], found: str, pairs: PairLogProbs
) -> None:
    loss = CustomLoss(function=function, name="mine")
    with pytest.raises(InputError, match=rf"the loss mine must return .* shape \(2,\), {found}"):
        loss(pairs)


# Mixtures


def test_a_mixture_is_the_weighted_sum(pairs: PairLogProbs) -> None:
    mixture = make_loss("sigmoid:0.8,hinge:0.2,sft:1", beta=0.2)
    parts = (make_loss("sigmoid", beta=0.2), make_loss("hinge", beta=0.2), make_loss("sft"))
    expected = sum(c * part(pairs) for c, part in zip((0.8, 0.2, 1.0), parts, strict=True))
    assert isinstance(expected, Tensor)
    assert mixture(pairs).tolist() == pytest.approx(expected.tolist())
    assert mixture.rewards(pairs)[0].tolist() == parts[0].rewards(pairs)[0].tolist()
    assert mixture.pair_weights(pairs) is pairs.weight
    assert mixture.at_reference(pairs).tolist() == pytest.approx(
        sum(c * part.at_reference(pairs) for c, part in zip((0.8, 0.2, 1.0), parts, strict=True))
    )


@pytest.mark.parametrize(
    ("name", "needs_reference", "reads"),
    [
        ("sft:1,simpo:0.5", False, {"margin", "label_prob"}),
        ("sft:1,hinge:1", True, {"margin"}),
        ("sigmoid:1,sft:1e-1", True, {"margin", "label_prob"}),
    ],
)
def test_a_mixture_needs_and_reads_what_its_terms_do(
    name: str, needs_reference: bool, reads: set[str]
) -> None:
    mixture = make_loss(name)
    assert mixture.needs_reference == needs_reference
    assert mixture.reads == reads


def test_a_mixture_refuses_columns_as_its_terms_do() -> None:
    check(make_loss("sigmoid:1,hinge:1"), margin=0.5, label_prob=0.5)
    with pytest.raises(InputError, match="pairs have a label_prob"):
        check(make_loss("hinge:1,sft:1"), margin=0.5, label_prob=0.5)
    smoothed = make_loss("sigmoid:1,sft:1", label_smoothing=0.1)
    check(smoothed)
    with pytest.raises(InputError, match="both say how far to trust a label"):
        check(smoothed, label_prob=0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmoid:0.8", {}, "a mixture of losses has two terms or more, got 1"),
        ("sigmoid:1,sft:0", {}, "must be above 0, got 0.0"),
        ("sigmoid:1,sft:-1", {}, "must be above 0, got -1.0"),
        ("sigmoid:1,sft:1.1.1", {}, "the coefficient of sft is no number: '1.1.1'"),
        ("sigmoid:1,sigmoid:1", {}, "names the loss sigmoid twice"),
        ("sigmoid:1,stf:1", {}, "unknown loss 'stf'; did you mean 'sft'"),
        ("hinge:1,sft:1", {"label_smoothing": 0.1}, "has no option 'label_smoothing'"),
    ],
)
def test_a_wrong_mixture_is_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_loss(name, **options)
