"""``dpo demo``: the whole way on a simulated agent, offline, in two minutes on two cores.

A simulator whose true rewards are known fills a feedback store; the builder makes preference pairs
of it; a tiny model from scratch is warmed up on the better answers (SFT) and then trained by DPO;
what DPO changed on held-out pairs, and what it is worth in true reward, is said with intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo.config import LossConfig, RunConfig
from dpo.data.builder import build_extraction_dataset
from dpo.data.dataset_files import write_dataset
from dpo.data.kinds.extraction import EXTRACTION
from dpo.data.simulate import simulate, simulated_situations, true_reward
from dpo.data.stores import open_store
from dpo.errors import InputError
from dpo.eval.bootstrap import ConfidenceInterval, compute_confidence_interval
from dpo.eval.language_model import LanguageModelPolicy
from dpo.eval.policies import Policy, RulesPolicy
from dpo.eval.tiny import make_tiny_model, make_tiny_tokenizer
from dpo.files import append_jsonl, atomic_write, write_json
from dpo.models import Decoder, save_model
from dpo.preferences import PreferencePair, read_pairs
from dpo.progress import Console
from dpo.report import write_report
from dpo.score import PairScore, score_pairs
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import Tokenizer
from dpo.train_config import TrainConfig
from dpo.trainer import Metrics, Trainer

POLICY = "extraction"
SFT = TrainConfig(
    epochs=20, batch_size=16, learning_rate=3e-3, warmup_steps=10, schedule="cosine", log_every=5
)
DPO = TrainConfig(
    epochs=4, batch_size=16, learning_rate=3e-4, warmup_steps=10, schedule="linear", log_every=1
)
BETA = 0.1


@dataclass(frozen=True)
class Held:
    """A figure of the held-out pairs before and after DPO, with 95 % intervals."""

    before: ConfidenceInterval
    after: ConfidenceInterval


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        folder: where everything lies.
        pairs: training pairs.
        held_out_pairs: pairs that were not trained on, none of which shares a prompt with them.
        held_out: loss, reward accuracy and margin of the held-out pairs.
        true_rewards: mean true reward over the held-out situations, by policy.
        gain: true reward of DPO less that of SFT, situation by situation.
        gain_over_rules: the same against the agent's rules.
    """

    folder: Path
    pairs: int
    held_out_pairs: int
    held_out: Mapping[str, Held]
    true_rewards: Mapping[str, ConfidenceInterval]
    gain: ConfidenceInterval
    gain_over_rules: ConfidenceInterval

    def verdict(self) -> str:
        """Say in plain words whether DPO helped."""
        interval = f"{self.gain.mean:+.3f} [{self.gain.lower:+.3f}, {self.gain.upper:+.3f}]"
        if self.gain.lower > 0:
            return f"DPO helped: true reward per decision {interval} against the SFT start."
        if self.gain.upper < 0:
            return f"DPO harmed: true reward per decision {interval} against the SFT start."
        return f"DPO made no difference that shows: true reward per decision {interval}."


def run_demo(folder: Path, *, seed: int, decisions: int, console: Console) -> DemoResult:
    """Simulate, build, train, evaluate; everything is left in ``folder``.

    Raises:
        InputError: the folder is not empty, or there are too few decisions for 100 pairs.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: choose another --out, or remove it")
    train, held_out = _build(folder, seed, decisions, console)
    tokenizer = make_tiny_tokenizer(text for pair in train for text in _texts(pair))
    tokens = tokenize_pairs(train, tokenizer).pairs
    held_out_tokens = tokenize_pairs(held_out, tokenizer).pairs
    model = make_tiny_model(tokenizer, seed=seed)
    console.say(
        f"a Llama of {sum(p.numel() for p in model.parameters()):,} parameters from scratch, "
        f"{tokenizer.vocab_size} tokens"
    )
    run = folder / "run"
    _train(Trainer(model, tokens, SFT, loss="sft"), "SFT", console)
    _save(model, tokenizer, folder / "sft")
    trainer = Trainer(model, tokens, DPO, loss="sigmoid", eval_pairs=held_out_tokens)
    before = _held_out(trainer, held_out_tokens)
    trainer.callbacks.append(lambda _, metrics: _log(run / "metrics.jsonl", metrics))
    run.mkdir(parents=True)
    _train(trainer, "DPO", console)
    after = _held_out(trainer, held_out_tokens)
    _save(model, tokenizer, run / "model")
    result = _evaluate(folder, tokens, held_out_tokens, held_out, before, after)
    _report(run, result)
    return result


def _build(
    folder: Path, seed: int, decisions: int, console: Console
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Fill the store, build the data set, and read its pairs back from disk."""
    folder.mkdir(parents=True, exist_ok=True)
    store_path = folder / "feedback.sqlite"
    with open_store(store_path, create=True) as store:
        store.record_decisions(simulate(POLICY, decisions, seed))
    console.say(f"SIMULATION: {decisions:,} decisions of an agent in {store_path}")
    dataset = build_extraction_dataset(store_path, split_by="group", eval_split=0.25, seed=seed)
    write_dataset(dataset, folder / "dataset")
    train, held_out = (
        read_pairs(folder / "dataset" / f"{POLICY}_dpo_{side}.jsonl") for side in ("train", "eval")
    )
    console.say(f"{len(train):,} preference pairs to train on, {len(held_out):,} held out")
    return train, held_out


def _texts(pair: PreferencePair) -> tuple[str, str, str]:
    assert isinstance(pair.prompt, str)
    assert isinstance(pair.chosen, str)
    assert isinstance(pair.rejected, str)
    return pair.prompt, pair.chosen, pair.rejected


def _train(trainer: Trainer, label: str, console: Console) -> None:
    with console.bar(label, trainer.total_steps, unit="steps") as bar:
        for step in trainer:
            bar.update(step.number, status=None if step.metrics is None else _status(step.metrics))


def _status(metrics: Metrics) -> str:
    return f"loss {metrics['loss']:.4f}  {metrics['perf/pairs_per_s']:.0f} pairs/s"


def _log(path: Path, metrics: Metrics) -> None:
    append_jsonl(path, {k: v if math.isfinite(v) else None for k, v in metrics.items()})


def _save(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a policy folder: the model and which kind of policy it is."""
    folder.mkdir(parents=True)
    save_model(model, folder)
    tokenizer.save(folder)
    write_json(folder / f"{POLICY}_metadata.json", {"policy": POLICY})


def _held_out(trainer: Trainer, pairs: TokenizedPairs) -> list[PairScore]:
    assert trainer.eval_batches is not None
    reference = trainer.eval_batches.reference
    assert reference is not None
    return score_pairs(trainer.module, pairs, reference, loss=trainer.loss)


def _evaluate(
    folder: Path,
    tokens: TokenizedPairs,
    held_out_tokens: TokenizedPairs,
    held_out: Sequence[PreferencePair],
    before: Sequence[PairScore],
    after: Sequence[PairScore],
) -> DemoResult:
    """Compare SFT, DPO and the rules; pairs of one prompt are resampled together."""
    prompts = [str(pair.prompt) for pair in held_out]
    figures_before, figures_after = _figures(before), _figures(after)
    rewards = _true_rewards(
        {
            "rules": RulesPolicy(EXTRACTION),
            "SFT": LanguageModelPolicy.load(folder / "sft"),
            "DPO": LanguageModelPolicy.load(folder / "run" / "model"),
        },
        set(prompts),
    )
    return DemoResult(
        folder=folder,
        pairs=len(tokens),
        held_out_pairs=len(held_out_tokens),
        held_out={
            name: Held(
                compute_confidence_interval(figures_before[name], groups=prompts),
                compute_confidence_interval(figures_after[name], groups=prompts),
            )
            for name in figures_before
        },
        true_rewards={name: compute_confidence_interval(r) for name, r in rewards.items()},
        gain=compute_confidence_interval(rewards["DPO"] - rewards["SFT"]),
        gain_over_rules=compute_confidence_interval(rewards["DPO"] - rewards["rules"]),
    )


def _figures(
    scores: Sequence[PairScore],
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Loss, reward accuracy (a tie is half right) and margin of every pair."""
    margins = np.array([score.margin for score in scores])
    return {
        "loss": np.logaddexp(0, -margins),
        "rewards/accuracy": (np.sign(margins) + 1) / 2,
        "rewards/margin": margins,
    }


def _true_rewards(
    policies: Mapping[str, Policy], held_out_prompts: set[str]
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """True reward of each policy's action in every situation whose prompt was held out."""
    states = [
        state
        for state in simulated_situations(POLICY)
        if EXTRACTION.render_prompt(state) in held_out_prompts
    ]
    return {
        name: np.array(
            [true_reward(POLICY, state, policy.decide(state).action) for state in states]
        )
        for name, policy in policies.items()
    }


def _report(run: Path, result: DemoResult) -> None:
    config = RunConfig(
        model="tiny, from scratch",
        data=f"{POLICY}_dpo_train.jsonl",
        out="run",
        eval_data=f"{POLICY}_dpo_eval.jsonl",
        loss=LossConfig(options={"beta": BETA}),
        train=DPO,
    )
    atomic_write(run / "config.toml", config.to_toml())
    summary = {
        f"held out {name}": {"before": _estimate(held.before), "after": _estimate(held.after)}
        for name, held in result.held_out.items()
    }
    summary["true reward (SFT, DPO)"] = {
        "before": _estimate(result.true_rewards["SFT"]),
        "after": _estimate(result.true_rewards["DPO"]),
    }
    write_json(run / "summary.json", json.loads(json.dumps(summary)))
    write_report(run)


def _estimate(interval: ConfidenceInterval) -> dict[str, float]:
    ends = {"low": interval.lower, "high": interval.upper} if interval.is_defined else {}
    return {"value": interval.mean, **ends}
