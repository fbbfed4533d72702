"""Metrics against numpy and arithmetic by hand, however their window is split."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dpo.metrics
from dpo.batching import AnswerBatch, PairBatch
from dpo.log_probs import TokenLogProbs
from dpo.losses import Mixture, PairLogProbs, make_loss, term_names
from dpo.losses.base import PAIR_COLUMNS
from dpo.metrics import MetricSums, TokenStatistics, k3_estimate
from dpo.models import Decoder
from dpo.scoring import ScoredPairs
from dpo.segments import Segments, TokenStream, plan_attention
from dpo.sources import MOST, Sources, sources_of
from dpo.tokenized_pairs import TokenizedPairs, columns_of
from dpo.train_config import TrainConfig
from dpo.trainer import Trainer

SIGMOID = make_loss("sigmoid", beta=0.1)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def changed(pairs: PairLogProbs, change: Callable[[Tensor], Tensor]) -> PairLogProbs:
    return PairLogProbs(*(change(getattr(pairs, name)) for name in PAIR_COLUMNS))


@dataclass(frozen=True)
class Window:
    """Pairs with what a loss and the vocabulary pass say of them; token values are per answer."""

    pairs: PairLogProbs
    losses: Tensor
    weights: Tensor
    rewards: tuple[Tensor, Tensor]
    tokens: TokenStatistics

    def rows(self, rows: list[int]) -> "Window":
        k3 = self.tokens.k3
        return Window(
            changed(self.pairs, lambda column: column[rows]),
            self.losses[rows],
            self.weights[rows],
            (self.rewards[0][rows], self.rewards[1][rows]),
            TokenStatistics(
                self.tokens.entropy[rows],
                self.tokens.chosen_is_top[rows],
                None if k3 is None else k3[rows],
            ),
        )

    def add_to(self, sums: MetricSums) -> None:
        sums.update(self.pairs, self.losses, self.weights, self.rewards, self.tokens)


def golden_pairs() -> PairLogProbs:
    """u = [1, -1], v = [-1, 1.5]: gaps [.2, -.25] at beta .1."""
    return PairLogProbs(
        chosen=column(-12, -30),
        rejected=column(-15, -28),
        reference_chosen=column(-13, -29),
        reference_rejected=column(-14, -29.5),
        chosen_tokens=column(5, 10),
        rejected_tokens=column(6, 8),
        weight=column(1, 3),
        margin=column(0, 0),
        label_prob=column(1, 1),
    )


def random_window(seed: int, count: int) -> Window:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        unit = torch.rand(count, generator=generator, dtype=torch.float64)
        return low + (high - low) * unit

    pairs = PairLogProbs(
        chosen=uniform(-60, -5),
        rejected=uniform(-60, -5),
        reference_chosen=uniform(-60, -5),
        reference_rejected=uniform(-60, -5),
        chosen_tokens=uniform(1, 9).round(),
        rejected_tokens=uniform(1, 9).round(),
        weight=uniform(0.5, 2),
        margin=torch.zeros(count, dtype=torch.float64),
        label_prob=uniform(0.5, 1),
    )
    tokens = TokenStatistics(uniform(0, 9), uniform(0, 4).round(), uniform(0, 2))
    return Window(pairs, SIGMOID(pairs), pairs.weight, SIGMOID.rewards(pairs), tokens)


def metrics_of(pairs: PairLogProbs, tokens: TokenStatistics | None = None) -> dict[str, float]:
    sums = MetricSums()
    sums.update(pairs, SIGMOID(pairs), pairs.weight, SIGMOID.rewards(pairs), tokens)
    return sums.result()


def pairs_with_gaps(*gaps: float) -> PairLogProbs:
    """Equally long pairs whose rewards at beta .1 differ by ``gaps``."""
    zero = torch.zeros(len(gaps), dtype=torch.float64)
    return PairLogProbs(
        chosen=10 * column(*gaps),
        rejected=zero,
        reference_chosen=zero,
        reference_rejected=zero,
        chosen_tokens=zero + 4,
        rejected_tokens=zero + 4,
        weight=zero + 1,
        margin=zero,
        label_prob=zero + 1,
    )


# Values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", (0.5981388693815918 + 3 * 0.8259394198788436) / 4),
        ("rewards/chosen", (0.1 - 3 * 0.1) / 4),
        ("rewards/rejected", (-0.1 + 3 * 0.15) / 4),
        ("rewards/margin", (0.2 - 3 * 0.25) / 4),
        ("rewards/margin_p50", (0.2 - 0.25) / 2),
        ("rewards/margin_p05", -0.25 + 0.05 * 0.45),
        ("rewards/margin_p95", 0.2 - 0.05 * 0.45),
        ("rewards/accuracy", 0.5),
        ("rewards/accuracy_strict", 0.5),
        ("rewards/tie_rate", 0.0),
        ("accuracy_len_controlled", 0.5),  # 1 where shorter, 0 where longer
        ("rewards/saturated", 0.0),
        ("grad_weight", (1 / (1 + math.exp(0.2)) + 1 / (1 + math.exp(-0.25))) / 2),
        ("logps/chosen", -21),
        ("logps/rejected", -21.5),
        ("logps_tok/chosen", -42 / 15),
        ("logps_tok/rejected", -43 / 14),
        ("nll/chosen", 42 / 15),
        ("ppl", math.exp(42 / 15)),
        ("kl/k1_seq_chosen", 0.0),
        ("kl/k1_seq_rejected", 0.25),
        ("kl/k1_tok", 0.5 / 29),
        ("displacement/chosen", 0.0),
        ("displacement/share_u_negative", 0.5),
        ("length/chosen", 7.5),
        ("length/rejected", 7),
        ("length/diff", 0.5),
        ("length/reward_corr", -1.0),  # two points on a falling line
    ],
)
def test_value_by_hand(name: str, value: float) -> None:
    assert metrics_of(golden_pairs())[name] == pytest.approx(value, abs=1e-12)


def test_loss_is_weighed_by_the_losss_own_weights() -> None:
    """SFT is the mean over chosen tokens: (12 + 3 * 30) / (5 + 3 * 10) with row weights 1 and 3."""
    loss, pairs, sums = make_loss("sft"), golden_pairs(), MetricSums()
    sums.update(pairs, loss(pairs), loss.pair_weights(pairs), loss.rewards(pairs))
    assert sums.result()["loss"] == pytest.approx(102 / 35)


def test_ties_count_half() -> None:
    metrics = metrics_of(pairs_with_gaps(0, 0, 1, -1))
    assert metrics["rewards/accuracy"] == 0.5
    assert metrics["rewards/accuracy_strict"] == 0.25
    assert metrics["rewards/tie_rate"] == 0.5


def test_saturated_is_the_share_of_pairs_beyond_99_percent() -> None:
    """s(4.6) = .9900, s(4.5) = .9890."""
    assert metrics_of(pairs_with_gaps(4.5, 4.6, 1, 100))["rewards/saturated"] == 0.5


def test_calibration_by_hand() -> None:
    """Forecasts .75, .75 and .25 of the labels 1, 0.4 and 0, in two of the ten bins.

    The bin of .75 sums to -.25 + .35 = .1, that of .25 to .25: (.1 + .25) / 3.
    """
    pairs = pairs_with_gaps(math.log(3), math.log(3), -math.log(3))
    labels = column(1, 0.4, 0)
    metrics = metrics_of(replace(pairs, label_prob=labels))
    assert metrics["calibration/ece"] == pytest.approx(0.35 / 3)
    assert metrics["calibration/brier"] == pytest.approx((0.25**2 + 0.35**2 + 0.25**2) / 3)


def test_certain_forecast_is_in_the_last_bin() -> None:
    pairs = pairs_with_gaps(1000)
    assert metrics_of(pairs)["calibration/ece"] == 0
    assert metrics_of(replace(pairs, label_prob=column(0)))["calibration/ece"] == 1


def test_accuracy_controlled_for_length_gives_each_stratum_one_voice() -> None:
    """Longer: 3 of 3 right; equal: 0 of 1; shorter: half of 2. (1 + 0 + .5) / 3."""
    pairs = pairs_with_gaps(1, 1, 1, -1, 1, -1)
    lengths = column(9, 8, 7, 4, 2, 1)
    metrics = metrics_of(replace(pairs, chosen_tokens=lengths))
    assert metrics["accuracy_len_controlled"] == pytest.approx(0.5)


def test_quantiles_and_correlation_equal_numpys() -> None:
    window = random_window(0, 101)
    metrics = metrics_of(window.pairs)
    gaps = (window.rewards[0] - window.rewards[1]).numpy()
    longer = (window.pairs.chosen_tokens - window.pairs.rejected_tokens).numpy()
    names = ["rewards/margin_p05", "rewards/margin_p50", "rewards/margin_p95"]
    quantiles = np.quantile(gaps, [0.05, 0.5, 0.95]).tolist()
    assert [metrics[name] for name in names] == pytest.approx(quantiles)
    correlation = float(np.corrcoef(longer, gaps)[0, 1])
    assert metrics["length/reward_corr"] == pytest.approx(correlation)


def test_token_metrics_are_means_over_tokens() -> None:
    """15 chosen and 14 rejected tokens in the golden pairs."""
    tokens = TokenStatistics(
        entropy=column(20, 9), chosen_is_top=torch.tensor([True] * 6), k3=column(1, 1.9)
    )
    metrics = metrics_of(golden_pairs(), tokens)
    assert metrics["entropy"] == pytest.approx(1)
    assert metrics["token_accuracy"] == pytest.approx(6 / 15)
    assert metrics["kl/k3_tok"] == pytest.approx(0.1)


def test_k3_by_hand() -> None:
    """e^1 - 1 - 1 and e^-1 - 1 + 1."""
    values = k3_estimate(column(-2, -1, -3), column(-1, -2, -3))
    assert values.tolist() == pytest.approx([math.e - 2, 1 / math.e, 0])


@given(st.floats(-1e4, 0, width=32), st.floats(-1e4, 0, width=32))
def test_k3_is_finite_and_not_negative(log_prob: float, reference: float) -> None:
    value = k3_estimate(torch.tensor([log_prob]), torch.tensor([reference]))
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert value.item() >= 0


# Terms of a mixture


def test_terms_of_a_mixture_by_hand() -> None:
    """SFT is a mean over pairs here: (12 / 5 + 3 * 30 / 10) / 4 with row weights 1 and 3."""
    loss, pairs = make_loss("sigmoid:0.8,sft:0.5"), golden_pairs()
    sums = MetricSums.of_loss(loss)
    sums.update(pairs, loss.with_terms(pairs), loss.pair_weights(pairs), loss.rewards(pairs))
    metrics = sums.result()
    sigmoid = metrics_of(pairs)["loss"]
    assert metrics["loss/sigmoid"] == pytest.approx(sigmoid)
    assert metrics["loss/sft"] == pytest.approx(2.85)
    assert metrics["loss"] == pytest.approx(0.8 * sigmoid + 0.5 * 2.85)


def test_loss_that_is_no_mixture_has_no_terms() -> None:
    assert not [name for name in metrics_of(golden_pairs()) if name.startswith("loss/")]


def test_terms_have_the_names_of_their_losses_each_its_own() -> None:
    def own(pairs: PairLogProbs) -> Tensor:
        return pairs.chosen

    terms = [make_loss("ipo"), make_loss("sigmoid"), make_loss("sigmoid", beta=0.5), make_loss(own)]
    mixture = Mixture(tuple((term, 1.0) for term in terms))
    assert term_names(mixture) == ["ipo", "sigmoid", "sigmoid_2", "own"]
    assert term_names(make_loss("ipo:1,sft:2")) == ["ipo", "sft"]


# Windows


@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(1, 23), max_size=6, unique=True).map(sorted),
    order=st.permutations(range(24)),
)
@settings(max_examples=30, deadline=None)
def test_no_metric_depends_on_split_or_order(seed: int, cuts: list[int], order: list[int]) -> None:
    window = random_window(seed, 24)
    whole, split = MetricSums(), MetricSums()
    window.add_to(whole)
    for first, last in zip([0, *cuts], [*cuts, 24], strict=True):
        window.rows(order[first:last]).add_to(split)
    assert split.result() == pytest.approx(whole.result(), rel=1e-10, abs=1e-10)


def test_merged_windows_are_the_window_of_both() -> None:
    window = random_window(0, 10)
    whole, first, second = MetricSums(), MetricSums(), MetricSums()
    window.add_to(whole)
    window.rows([0, 1, 2]).add_to(first)
    window.rows([3, 4, 5, 6, 7, 8, 9]).add_to(second)
    first.merge(second)
    assert first.result() == pytest.approx(whole.result(), rel=1e-12)


def test_sums_of_float32_columns_keep_float64_digits() -> None:
    """Gaps of 100 with a spread of 0.01: a float32 variance would be round-off alone."""
    window = random_window(0, 1000)
    chosen = (100 + 0.01 * torch.rand(1000, generator=torch.Generator().manual_seed(0))).float()
    pairs = changed(window.pairs, Tensor.float)
    sums = MetricSums()
    sums.update(pairs, chosen, pairs.weight, (chosen, torch.zeros(1000)))
    longer = (pairs.chosen_tokens - pairs.rejected_tokens).double()
    correlation = float(np.corrcoef(longer, chosen.double())[0, 1])
    assert sums.result()["length/reward_corr"] == pytest.approx(correlation, rel=1e-4)


def test_merging_an_empty_window_changes_nothing() -> None:
    window, sums = random_window(0, 4), MetricSums()
    window.add_to(sums)
    before = sums.result()
    sums.merge(MetricSums())
    assert sums.result() == before


def test_empty_window_has_no_metrics() -> None:
    assert MetricSums().result() == {}


def test_token_metrics_are_left_out_where_not_given() -> None:
    metrics = metrics_of(golden_pairs())
    assert not {"entropy", "token_accuracy", "kl/k3_tok"} & set(metrics)


def test_tokens_of_some_micro_batches_are_averaged_over_those() -> None:
    window, sums = random_window(0, 6), MetricSums()
    window.rows([0, 1]).add_to(sums)
    rest = window.rows([2, 3, 4, 5])
    sums.update(rest.pairs, rest.losses, rest.weights, rest.rewards)
    alone = MetricSums()
    window.rows([0, 1]).add_to(alone)
    assert sums.result()["entropy"] == alone.result()["entropy"]


def test_metrics_against_a_reference_are_left_out_without_one() -> None:
    window, sums = random_window(0, 4), MetricSums()
    window.add_to(sums)
    with_reference = set(sums.result())
    sums.update(window.pairs, window.losses, window.weights, window.rewards, has_reference=False)
    left_out = with_reference - set(sums.result())
    assert left_out == {n for n in with_reference if n.startswith(("kl/", "displacement/"))}
    assert len(left_out) == 6


def test_window_without_a_reference_stays_so_when_merged() -> None:
    window, sums, other = random_window(0, 4), MetricSums(), MetricSums()
    window.add_to(sums)
    other.update(window.pairs, window.losses, window.weights, window.rewards, has_reference=False)
    sums.merge(other)
    assert "kl/k1_tok" not in sums.result()


def test_metric_with_denominator_zero_is_left_out() -> None:
    metrics = metrics_of(replace(golden_pairs(), weight=column(0, 0)))
    assert "loss" not in metrics
    assert "rewards/chosen" not in metrics
    assert "rewards/accuracy" in metrics


@pytest.mark.parametrize("gaps", [(0.0, 0.0, 0.0), (0.1, 0.1, 0.1), (1.0, 2.0, 3.0)])
def test_correlation_with_a_constant_is_left_out(gaps: tuple[float, ...]) -> None:
    """All lengths are equal, and in two cases all gaps are."""
    assert "length/reward_corr" not in metrics_of(pairs_with_gaps(*gaps))


@given(gap=st.floats(-100, 100), count=st.integers(2, 50))
@settings(max_examples=50, deadline=None)
def test_correlation_with_equal_gaps_is_left_out_despite_round_off(gap: float, count: int) -> None:
    window, sums = random_window(0, count), MetricSums()
    chosen = torch.full_like(window.losses, gap)
    sums.update(window.pairs, window.losses, window.weights, (chosen, chosen * 0))
    assert "length/reward_corr" not in sums.result()


def test_perplexity_that_overflows_is_left_out() -> None:
    pairs = pairs_with_gaps(-1000)  # -10 000 nats over 4 tokens
    assert "ppl" not in metrics_of(pairs)
    assert metrics_of(pairs)["nll/chosen"] == 2500


def test_loss_that_is_not_a_number_is_reported() -> None:
    pairs = golden_pairs()
    sums = MetricSums()
    sums.update(pairs, column(1, math.nan), pairs.weight, SIGMOID.rewards(pairs))
    assert math.isnan(sums.result()["loss"])


# The device


def test_adding_never_waits_for_the_device() -> None:
    """Meta tensors have no values: reading one raises."""
    window = random_window(0, 4)
    pairs = changed(window.pairs, lambda column: column.to("meta"))
    losses = SIGMOID(pairs)
    tokens = TokenStatistics(losses, losses, k3_estimate(losses, losses))
    sums = MetricSums()
    sums.update(pairs, losses, SIGMOID.pair_weights(pairs), SIGMOID.rewards(pairs), tokens)
    with pytest.raises(NotImplementedError):
        sums.result()


def test_result_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    window, sums, reads = random_window(0, 4), MetricSums(), []
    window.add_to(sums)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        read = getattr(Tensor, name)

        def counted(tensor: Tensor, read: object = read, name: str = name) -> object:
            reads.append(name)
            assert callable(read)
            return read(tensor)

        monkeypatch.setattr(Tensor, name, counted)
    sums.result()
    assert reads == ["tolist"]


def test_adding_keeps_no_graph() -> None:
    pairs = golden_pairs()
    pairs.chosen.requires_grad_()
    sums = MetricSums()
    sums.update(pairs, SIGMOID(pairs), pairs.weight, SIGMOID.rewards(pairs))
    assert not any(column.requires_grad for column in sums._columns)


@pytest.mark.gpu
def test_metrics_on_cuda_equal_the_cpu() -> None:
    window, here, there = random_window(0, 24), MetricSums(), MetricSums()
    window.add_to(here)
    cuda = changed(window.pairs, Tensor.cuda)
    tokens = [getattr(window.tokens, field.name).cuda() for field in fields(window.tokens)]
    there.update(cuda, SIGMOID(cuda), cuda.weight, SIGMOID.rewards(cuda), TokenStatistics(*tokens))
    assert there.result() == pytest.approx(here.result(), rel=1e-10, abs=1e-10)


# A scored micro-batch


def scored_pairs(*, reference: Tensor | None) -> ScoredPairs:
    """One pair with answers of 2 and 1 tokens."""
    segments = Segments((1, 2, 1), (None, 0, 0))
    texts = AnswerBatch(
        stream=TokenStream(
            input_ids=torch.arange(4),
            positions=torch.from_numpy(segments.positions()),
            plan=plan_attention(segments),
        ),
        predictors=torch.tensor([0, 1, 0]),
        targets=torch.tensor([1, 2, 3]),
        answers=torch.tensor([0, 0, 1]),
        answer_count=2,
        answer_segments=(1, 2),
    )
    one = torch.ones(1)
    pairs = PairLogProbs(
        chosen=one * -3,
        rejected=one * -3,
        reference_chosen=one * -4,
        reference_rejected=one * -2,
        chosen_tokens=one * 2,
        rejected_tokens=one,
        weight=one,
        margin=one * 0,
        label_prob=one,
    )
    return ScoredPairs(
        batch=PairBatch(texts, reference, weight=one, margin=one * 0, label_prob=one, rows=(0,)),
        tokens=TokenLogProbs(
            log_probs=torch.tensor([-1.0, -2.0, -3.0]),
            entropy=torch.tensor([0.5, 1.0, 1.5]),
            is_top=torch.tensor([True, True, False]),
        ),
        pairs=pairs,
        loss_pairs=pairs,
    )


def test_scored_micro_batch_adds_its_pairs_and_tokens() -> None:
    """Of the three k3, two are e^-1 - 1 + 1 and one is e - 1 - 1."""
    sums, scored = MetricSums(), scored_pairs(reference=torch.tensor([-2.0, -3.0, -2.0]))
    sums.add(SIGMOID, scored, SIGMOID(scored.pairs))
    metrics = sums.result()
    assert metrics["rewards/margin"] == pytest.approx(0.2)
    assert metrics["entropy"] == pytest.approx(1.0)
    assert metrics["token_accuracy"] == pytest.approx(1.0)
    assert metrics["kl/k3_tok"] == pytest.approx((2 / math.e + math.e - 2) / 3)


def test_divergence_that_a_loss_takes_is_a_mean_over_tokens() -> None:
    sums, scored = MetricSums(), scored_pairs(reference=torch.tensor([-2.0, -3.0, -2.0]))
    seen = replace(
        scored.pairs, chosen_statistic=torch.tensor([0.6]), rejected_statistic=torch.tensor([0.3])
    )
    loss = make_loss("tdpo1")
    sums.add(loss, replace(scored, loss_pairs=seen), loss(seen))
    assert sums.result()["kl/full_fwd"] == pytest.approx(0.3)


def test_scored_micro_batch_without_a_reference_has_none_of_its_metrics() -> None:
    loss, sums, scored = make_loss("sft"), MetricSums(), scored_pairs(reference=None)
    sums.add(loss, scored, loss(scored.pairs))
    metrics = sums.result()
    assert metrics["loss"] == pytest.approx(1.5)
    assert not any(name.startswith(("kl/", "displacement/")) for name in metrics)


def test_table_of_the_module_lists_every_metric_of_a_step(
    make_model: Callable[..., Decoder], make_pairs: Callable[..., TokenizedPairs]
) -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    config = TrainConfig(batch_size=8, steps=2, learning_rate=1e-2, router_loss=0.1)
    *_, last = Trainer(make_model(**experts), make_pairs(8), config, loss="tdpo1")
    assert last.metrics is not None
    table = re.findall(r"^([a-z_/0-9]+) {2,}", dpo.metrics.__doc__ or "", re.MULTILINE)
    assert sorted(table) == sorted([*last.metrics, "perf/mfu"])  # which needs a known GPU


# Sources


def with_sources(pairs: TokenizedPairs, *names: str | None) -> TokenizedPairs:
    """Give row after row a source, in turn."""
    named = [replace(pair, source=names[row % len(names)]) for row, pair in enumerate(pairs)]
    return columns_of(named)


def test_sources_are_ordered_by_frequency_and_named_by_plain_characters(
    make_pairs: Callable[..., TokenizedPairs],
) -> None:
    found = sources_of(with_sources(make_pairs(10), "a/b c", None, "a b\u00e9-1.0", None, "a_b_c"))
    assert found is not None
    assert found.names == ("a_b_c", "unnamed", "a_b\u00e9-1.0")
    assert found.numbers.tolist() == [0, 1, 2, 1, 0] * 2


@pytest.mark.parametrize("name", [None, "one"])
def test_one_source_needs_no_telling_apart(
    make_pairs: Callable[..., TokenizedPairs], name: str | None
) -> None:
    assert sources_of(with_sources(make_pairs(4), name)) is None


@pytest.mark.parametrize("frequent", ["frequent", "other"])
def test_rarest_of_many_sources_are_one(
    make_pairs: Callable[..., TokenizedPairs], frequent: str
) -> None:
    names = [frequent, *(f"s{number}" for number in range(MOST + 3))]
    found = sources_of(with_sources(make_pairs(2 * len(names)), *names))
    assert found is not None
    assert found.names[-1] == "other"
    assert len(set(found.names)) == len(found.names) <= MOST
    assert {found.names[found.numbers[row]] for row in (-1, -2, -3)} == {"other"}
    assert found.names[found.numbers[0]] == frequent


@given(order=st.permutations(range(12)), cut=st.integers(0, 12))
@settings(max_examples=20, deadline=None)
def test_metrics_of_sources_are_those_of_their_pairs_alone(order: list[int], cut: int) -> None:
    window, rows = random_window(0, 12), np.array(order)
    sources = Sources(("a", "absent", "b"), np.arange(12) % 2 * 2)
    parts = [MetricSums(sources), MetricSums(sources)]
    for sums, part in zip(parts, (order[:cut], order[cut:]), strict=True):
        if part:
            add_rows(sums, window, part)
    parts[0].merge(parts[1])
    found = parts[0].result()
    for number, name in enumerate(("a", "b")):
        alone = MetricSums()
        window.rows(rows[rows % 2 == number].tolist()).add_to(alone)
        expected = alone.result()
        for metric in ("loss", "rewards/accuracy", "rewards/margin"):
            assert found[f"source/{name}/{metric}"] == pytest.approx(expected[metric], rel=1e-12)
        assert found[f"source/{name}/pairs"] == 6
    assert not [name for name in found if "absent" in name]


def test_loss_that_is_not_a_number_stays_in_its_source() -> None:
    window = random_window(0, 4)
    losses = window.losses.clone()
    losses[0] = math.nan
    sums = MetricSums(Sources(("a", "b"), np.array([0, 1, 1, 0])))
    add_rows(sums, replace(window, losses=losses), [0, 1, 2, 3])
    metrics = sums.result()
    assert math.isnan(metrics["source/a/loss"])
    assert math.isfinite(metrics["source/b/loss"])


def add_rows(sums: MetricSums, window: Window, rows: list[int]) -> None:
    """Add rows of a window as a scored micro-batch of the loss that the window is of."""
    part = window.rows(rows)
    scored = scored_pairs(reference=None)
    scored = replace(
        scored,
        batch=replace(scored.batch, rows=tuple(rows)),
        pairs=part.pairs,
        loss_pairs=part.pairs,
    )
    sums.add(SIGMOID, scored, part.losses)


def test_evaluation_tells_sources_apart_whatever_the_batch_size(
    make_model: Callable[..., Decoder], make_pairs: Callable[..., TokenizedPairs]
) -> None:
    pairs = with_sources(make_pairs(8), "web/a", "web/a", "book")
    results = []
    for size in (1, 8):
        config = TrainConfig(batch_size=4, steps=2, learning_rate=1e-2, micro_batch_size=size)
        model = make_model(dtype=torch.float64)
        trainer = Trainer(model, make_pairs(4, seed=1), config, eval_pairs=pairs)
        trainer.train()
        results.append(trainer.evaluate())
    assert results[0] == pytest.approx(results[1], abs=1e-10)
    assert results[0]["eval/source/web_a/pairs"] == 6
    shares = [results[0][f"eval/source/{name}/rewards/accuracy"] for name in ("web_a", "book")]
    assert (6 * shares[0] + 2 * shares[1]) / 8 == results[0]["eval/rewards/accuracy"]


# Gradients


def test_clip_share_is_that_of_the_steps_of_the_window(
    make_model: Callable[..., Decoder], make_pairs: Callable[..., TokenizedPairs]
) -> None:
    """Of two steps that move next to nothing, the bound lies between the norms."""

    def lines(max_grad_norm: float | None, log_every: int) -> list[Mapping[str, float]]:
        config = TrainConfig(
            batch_size=4, steps=2, log_every=log_every, max_grad_norm=max_grad_norm
        )
        steps = Trainer(make_model(), make_pairs(), config)
        return [step.metrics for step in steps if step.metrics is not None]

    first, second = lines(None, 1)
    assert "health/clip_share" not in first
    (both,) = lines((first["grad_norm"] + second["grad_norm"]) / 2, 2)
    assert both["health/clip_share"] == 0.5
