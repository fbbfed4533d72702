"""A language model as a policy: chances of actions, decisions, free generation, loading."""

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from dpo.adapter_files import save_adapter
from dpo.adapters import Adapter, add_adapter
from dpo.batching import collate_answers
from dpo.data.kinds import KINDS, PolicyKind
from dpo.data.kinds.extraction import ExtractionKind, ExtractionState
from dpo.data.simulate import simulated_situations
from dpo.errors import InputError, RunError
from dpo.eval.language_model import FreePolicy, LanguageModelPolicy
from dpo.eval.policies import (
    Policy,
    RulesPolicy,
    check_decision,
    decide_all,
    decide_with_fallback,
    load_policy,
)
from dpo.generate import GenerateOptions
from dpo.log_probs import completion_log_probs
from dpo.models import Decoder, init_model, load_model, parse_config, save_model
from dpo.preferences import PreferencePair
from dpo.progress import Console
from dpo.tokenization import tokenize_pairs
from dpo.tokenizer import Tokenizer, byte_tokenizer, train_bpe

EXTRACTION = KINDS["extraction"]
(STATE,) = simulated_situations("extraction", 1)
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bytes with begin": byte_tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>", chat_template=None),
    "bpe": train_bpe(['What action should be taken? "entryType": "knowledge"'] * 2, 300),
    "answer merged with prompt": train_bpe(["taken?{ memory?{ done?{\n"] * 4, 300),
    "token across words": byte_tokenizer(("<|im_start|>", "<|im_end|>", "be taken")),
}

MakeModel = Callable[..., Decoder]


def make_policy(
    make_model: MakeModel,
    kind: PolicyKind = EXTRACTION,
    tokenizer: Tokenizer | None = None,
    config: Mapping[str, object] | None = None,
    **options: Any,
) -> LanguageModelPolicy:
    """A policy of a random model that computes in float64."""
    shape = {"vocab_size": 300, "max_position_embeddings": 1024, **(config or {})}
    model = make_model(dtype=torch.float64, **shape)
    return LanguageModelPolicy(model, tokenizer or byte_tokenizer(), kind, **options)


@torch.no_grad()
def scored_one_by_one(policy: LanguageModelPolicy, state: Any) -> list[float]:
    """Log-prob of each action by itself, tokenized as a pair of the training data."""
    prompt = policy.kind.render_prompt(state)
    texts = [policy.kind.render_action(action) for action in policy.kind.actions()]
    log_probs = []
    for index, text in enumerate(texts):
        pair = PreferencePair(prompt, chosen=text, rejected=texts[index - 1])
        tokens = tokenize_pairs([pair], policy.tokenizer).pairs[0]
        batch = collate_answers([(tokens.prompt_ids, [tokens.chosen_ids])])
        log_probs.append(float(completion_log_probs(policy.model, batch).log_probs.sum()))
    return log_probs


class TerseExtraction(ExtractionKind):
    """Extraction with a prompt that a tiny model can learn in a second."""

    def render_prompt(self, state: ExtractionState) -> str:
        return "What now?"


@pytest.fixture(scope="module")
def writer() -> LanguageModelPolicy:
    """A policy whose model has learnt by heart to answer with skip or defer, evenly."""
    config = {
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }
    kind, tokenizer, model = TerseExtraction(), byte_tokenizer(), init_model(parse_config(config))
    skip, defer = (kind.render_action(action) for action in kind.actions()[:2])
    pair = PreferencePair(kind.render_prompt(STATE), skip, defer)
    ids = tokenize_pairs([pair], tokenizer).pairs[0]
    batch = collate_answers([(ids.prompt_ids, [ids.chosen_ids, ids.rejected_ids])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (-completion_log_probs(model, batch).log_probs.mean()).backward()
        optimizer.step()
    return LanguageModelPolicy(model, tokenizer, kind)


# --- chances ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [("extraction", name) for name in TOKENIZERS]
    + [("retrieval", "bpe"), ("consolidation", "bpe")],
)
def test_log_probs_are_those_of_each_action_scored_alone(
    make_model: MakeModel, kind: str, tokenizer: str
) -> None:
    policy = make_policy(make_model, KINDS[kind], TOKENIZERS[tokenizer])
    states = simulated_situations(kind, 2)
    expected = [scored_one_by_one(policy, state) for state in states]
    assert policy.action_log_probs(states) == pytest.approx(np.array(expected), rel=0, abs=1e-9)


def test_a_window_of_attention_changes_nothing_of_it(make_model: MakeModel) -> None:
    config = {"model_type": "mistral", "sliding_window": 50}
    policy = make_policy(make_model, config=config)
    expected = [scored_one_by_one(policy, STATE)]
    assert policy.action_log_probs([STATE]) == pytest.approx(np.array(expected), rel=0, abs=1e-9)


def test_chances_are_shares_of_what_the_actions_have_together(make_model: MakeModel) -> None:
    policy = make_policy(make_model)
    states = simulated_situations("extraction", 4)
    chances, log_probs = policy.action_chances(states), policy.action_log_probs(states)
    assert chances.shape == (4, len(EXTRACTION.actions()))
    assert chances.sum(axis=1) == pytest.approx(np.ones(4), abs=1e-12)
    together = np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    assert chances == pytest.approx(np.exp(log_probs - together))


def test_chances_do_not_depend_on_the_batches(make_model: MakeModel) -> None:
    states = simulated_situations("retrieval", 7)
    results = [
        make_policy(make_model, KINDS["retrieval"], tokens_per_batch=size).action_chances(states)
        for size in (1, 2000, 100_000)
    ]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=0, abs=1e-12)


# --- decisions ----------------------------------------------------------------------------------


def test_several_passes_show_how_many_states_are_done(make_model: MakeModel) -> None:
    log = io.StringIO()
    policy = make_policy(make_model, tokens_per_batch=1, console=Console(log))
    states = simulated_situations("extraction", 3)
    policy.decide_batch(states[:1])
    assert log.getvalue() == ""  # one pass has nothing to show
    policy.decide_batch(states)
    assert log.getvalue().startswith("language model 100% 3/3 [")


def test_the_likeliest_action_is_taken_and_its_chance_is_the_confidence(
    make_model: MakeModel,
) -> None:
    policy: Policy = (model := make_policy(make_model))
    states = simulated_situations("extraction", 5)
    for state, chances in zip(states, model.action_chances(states), strict=True):
        decision = policy.decide(state)
        assert decision.action == EXTRACTION.actions()[chances.argmax()]
        assert decision.confidence == pytest.approx(chances.max(), abs=1e-12)
        assert decision.probabilities is None
        check_decision(policy, decision)


def test_drawn_actions_come_with_the_chances_they_were_drawn_with(
    writer: LanguageModelPolicy,
) -> None:
    policy = LanguageModelPolicy(writer.model, writer.tokenizer, writer.kind, seed=1)
    chances = policy.action_chances([STATE])[0]
    counts = np.zeros(len(chances))
    for decision in policy.decide_batch([STATE] * 400):
        index = EXTRACTION.actions().index(decision.action)
        counts[index] += 1
        assert decision.probabilities == tuple(chances)
        assert decision.confidence == chances[index]
        check_decision(policy, decision)
    assert min(counts[:2]) > 100
    deviations = np.sqrt(400 * chances * (1 - chances))
    assert (np.abs(counts - 400 * chances) <= 3 * deviations + 1).all()


def test_draws_depend_on_the_seed_and_not_on_batches(writer: LanguageModelPolicy) -> None:
    first, again, other = (
        LanguageModelPolicy(writer.model, writer.tokenizer, writer.kind, seed=seed)
        for seed in (3, 3, 4)
    )
    in_batch = [decision.action for decision in first.decide_batch([STATE] * 12)]
    assert [again.decide(STATE).action for _ in range(12)] == in_batch
    assert [decision.action for decision in other.decide_batch([STATE] * 12)] != in_batch


def test_no_states_need_no_decision(writer: LanguageModelPolicy) -> None:
    assert writer.decide_batch([]) == []


def test_many_states_are_decided_in_few_passes(make_model: MakeModel) -> None:
    policy = make_policy(make_model, tokens_per_batch=100_000)
    passes: list[int] = []
    policy.model.register_forward_hook(lambda *_: passes.append(1))
    states = simulated_situations("extraction", 20)
    decide_all(policy, states * 3)
    assert len(passes) == 1


def test_rules_answer_where_a_prompt_is_too_long_and_the_reason_is_kept(
    make_model: MakeModel,
) -> None:
    policy = make_policy(make_model, config={"max_position_embeddings": 100})
    decision = decide_with_fallback(policy, STATE)
    assert decision.action == RulesPolicy(EXTRACTION).decide(STATE).action
    assert decision.fallback_reason is not None
    assert "a prompt and an action have" in decision.fallback_reason
    with pytest.raises(InputError, match="tokens, the model was made for 100"):
        policy.decide(STATE)


def test_numbers_that_are_not_finite_are_no_chances(make_model: MakeModel) -> None:
    policy = make_policy(make_model)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="language model: the model gives log-probs that are not fi"):
        policy.decide(STATE)


def test_actions_that_a_tokenizer_writes_alike_are_refused(make_model: MakeModel) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": '{"eos_token": "</s>"}'}
    tokenizer = Tokenizer({name: text.encode() for name, text in files.items()}, name="words")
    policy = make_policy(make_model, tokenizer=tokenizer)
    with pytest.raises(InputError, match="the tokenizer writes different extraction actions alike"):
        policy.decide(STATE)


# --- writing freely -----------------------------------------------------------------------------


def test_an_action_that_is_written_freely_is_parsed(writer: LanguageModelPolicy) -> None:
    written = writer.generate_action(STATE)
    assert written in EXTRACTION.actions()[:2]
    generated = writer.generate_actions([STATE, STATE])
    assert generated.actions == (written, written)
    assert generated.faults == (None, None)
    assert generated.invalid_share == 0.0


def test_log_probs_tell_how_much_of_what_is_written_freely_is_valid(
    writer: LanguageModelPolicy,
) -> None:
    options = GenerateOptions(max_new_tokens=100, temperature=1.0, seed=2)
    generated = writer.generate_actions([STATE] * 200, options)
    valid = np.exp(writer.action_log_probs([STATE])).sum()
    assert 0.2 < valid < 0.99
    deviation = np.sqrt(valid * (1 - valid) / 200)
    assert 1 - generated.invalid_share == pytest.approx(valid, abs=3 * deviation)


def test_what_is_no_action_is_counted_and_said(make_model: MakeModel) -> None:
    tokenizer = byte_tokenizer()
    policy = make_policy(make_model, tokenizer=tokenizer)
    states = simulated_situations("extraction", 3)
    endless = policy.generate_actions(states, GenerateOptions(max_new_tokens=4))
    assert endless.actions == (None,) * 3
    assert endless.invalid_share == 1.0
    assert all("not ended after 4 tokens" in str(fault) for fault in endless.faults)
    tokenizer.eos_ids = frozenset(range(300))  # any token ends the text
    with pytest.raises(InputError, match="language model: extraction response: "):
        policy.generate_action(states[0])


def test_a_free_policy_answers_by_the_rules_where_what_it_writes_is_no_action(
    make_model: MakeModel,
) -> None:
    babbling = FreePolicy(make_policy(make_model), GenerateOptions(max_new_tokens=4))
    states = simulated_situations("extraction", 3)
    for state, decision in zip(states, babbling.decide_batch(states), strict=True):
        assert decision.action == RulesPolicy(EXTRACTION).decide(state).action
        assert decision.fallback_reason is not None
        assert "extraction response: " in decision.fallback_reason


def test_a_free_policy_takes_what_it_writes(writer: LanguageModelPolicy) -> None:
    policy = FreePolicy(writer)
    decision = policy.decide(STATE)
    assert policy.name == f"free:{writer.name}"
    assert decision.action == writer.generate_action(STATE)
    assert decision.fallback_reason is None
    index = writer.kind.actions().index(decision.action)
    written = np.exp(writer.action_log_probs([STATE])[0, index])
    assert decision.confidence == pytest.approx(written, rel=1e-4)


def test_beliefs_are_the_chances_whether_or_not_one_draws(writer: LanguageModelPolicy) -> None:
    decision = writer.decide(STATE)
    assert decision.probabilities is None
    assert decision.beliefs == pytest.approx(writer.action_chances([STATE])[0])


def test_nothing_is_written_for_no_state(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match="there are no states to generate actions for"):
        make_policy(make_model).generate_actions([])


# --- on disk ------------------------------------------------------------------------------------


def write_policy(
    make_model: MakeModel, folder: Path, metadata: object, vocab_size: int = 300
) -> Path:
    folder.mkdir()
    save_model(make_model(vocab_size=vocab_size, max_position_embeddings=1024), folder)
    byte_tokenizer().save(folder)
    (folder / "retrieval_metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    return folder


def test_a_policy_folder_gives_the_same_chances_back(make_model: MakeModel, tmp_path: Path) -> None:
    kind = KINDS["retrieval"]
    folder = write_policy(make_model, tmp_path / "policy", {"policy": "retrieval", "config": {}})
    original = LanguageModelPolicy(
        make_model(vocab_size=300, max_position_embeddings=1024), byte_tokenizer(), kind
    )
    policy = LanguageModelPolicy.load(folder, device="cpu")
    states = simulated_situations("retrieval", 3)
    assert policy.kind is kind
    assert policy.name == str(folder)
    assert policy.action_chances(states) == pytest.approx(original.action_chances(states), abs=1e-6)
    assert load_policy(str(folder), kind).decide(states[0]) == policy.decide(states[0])
    assert load_policy(f"draw:{folder}", kind).decide(states[0]).probabilities is not None
    free = load_policy(f"free:{folder}", kind)
    assert free.name == f"free:{folder}"
    assert free.decide(states[0]).fallback_reason is not None  # of random weights


def test_a_policy_that_is_an_adapter_is_put_onto_its_base(
    make_model: MakeModel, tmp_path: Path
) -> None:
    kind, states = KINDS["retrieval"], simulated_situations("retrieval", 3)
    base = write_policy(make_model, tmp_path / "base", {"policy": "retrieval"})
    model = load_model(base)
    add_adapter(model, Adapter(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, folder, base=str(base))
    (folder / "retrieval_metadata.json").write_text('{"policy": "retrieval"}', encoding="utf-8")
    expected = LanguageModelPolicy(model, byte_tokenizer(), kind).action_log_probs(states)
    policy = LanguageModelPolicy.load(folder, device="cpu")
    assert policy.action_log_probs(states) == pytest.approx(expected, abs=1e-2)  # of some -100
    plain = LanguageModelPolicy.load(base, device="cpu").action_log_probs(states)
    assert abs(plain - expected).max() > 1
    shutil.rmtree(base)
    with pytest.raises(InputError, match=r"the base of the adapter .*adapter: .*base"):
        LanguageModelPolicy.load(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"policy": "driving"}, "policy 'driving' is of no known kind; known are extraction"),
        ({"policy": ["retrieval"]}, r"policy \['retrieval'\] is of no known kind"),
        ({}, "policy None is of no known kind"),
        ([], "policy None is of no known kind"),
    ],
)
def test_a_policy_of_an_unknown_kind_is_refused(
    make_model: MakeModel, tmp_path: Path, metadata: object, message: str
) -> None:
    folder = write_policy(make_model, tmp_path / "policy", metadata)
    with pytest.raises(InputError, match=message):
        LanguageModelPolicy.load(folder)


def test_a_model_that_is_no_policy_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = write_policy(make_model, tmp_path / "policy", {})
    (folder / "retrieval_metadata.json").unlink()
    with pytest.raises(InputError, match=r"no trained policy: .*_metadata.json, found 0"):
        LanguageModelPolicy.load(folder)


def test_folders_beside_the_policy_name_it(tmp_path: Path) -> None:
    (tmp_path / "dpo" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds a whole training: its policy is .*dpo/model"):
        LanguageModelPolicy.load(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (data / "extraction_examples_eval.jsonl").touch()
    with pytest.raises(InputError, match="is a data set, no policy"):
        LanguageModelPolicy.load(data)


def test_a_data_set_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "retrieval_metadata.json").write_text('{"policy": "retrieval"}', encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        LanguageModelPolicy.load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    metadata = {"policy": "retrieval"}
    folder = write_policy(make_model, tmp_path / "policy", metadata, vocab_size=257)
    with pytest.raises(InputError, match="has 258 tokens, the model embeddings for 257"):
        LanguageModelPolicy.load(folder)
