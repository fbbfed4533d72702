"""A policy that is a language model: it scores every action of its kind, or writes one freely.

Shapes: B states, A actions, S segments of the tree of all actions' tokens.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dpo.batching import collate_forest
from dpo.data.kinds import KINDS, PolicyKind
from dpo.errors import InputError, RunError
from dpo.eval.policies import Action, PolicyDecision, RulesPolicy, State
from dpo.eval.token_trie import TokenTrie, build_trie
from dpo.files import read_json
from dpo.generate import GenerateOptions, Generation, encode_prompts, generate
from dpo.inputs import find_model
from dpo.log_probs import completion_log_probs
from dpo.models import Decoder
from dpo.preferences import PreferencePair
from dpo.progress import Console
from dpo.tokenization import tokenize_pairs
from dpo.tokenizer import Tokenizer

_SHOWN_CHARACTERS = 60


class LanguageModelPolicy:
    """Chooses among the actions of its kind by the probability that the model writes them.

    The tokens of all actions form a tree below the prompt, and one pass over prompt and tree gives
    the log-prob of every action, its end included: each token is computed once. Divided by what all
    actions have together, these are the chances of the actions, so an invalid answer has none.

    By default the likeliest action is taken, and its chance is the confidence. With a ``seed``,
    actions are drawn with their chances, which the decision then tells: for exploration, and as
    propensities for off-policy evaluation.

    The actions are those of ``kind.actions()``, which hold no ids (``targetEntries``): which
    entries an action is about is not the model's to say, since no prompt shows them. The caller,
    who knows the entries, adds them: ``dataclasses.replace(action, target_entries=...)``.

    Args:
        model: trained on the kind's prompts and responses.
        tokenizer: of the model.
        kind: whose states are read and whose actions are taken.
        name: in reports.
        seed: of the draws, which depend on it and on the number of decisions before; None draws
            nothing.
        tokens_per_batch: tokens of prompts and actions in one pass, which bounds the memory; the
            chances do not depend on it.
        console: where the progress of several passes is shown; None shows nothing.

    Example:
        >>> from dpo import LanguageModelPolicy, build_extraction_dataset
        >>> from dpo import load_model, load_tokenizer
        >>> from dpo.data.kinds.extraction import EXTRACTION
        >>> policy = LanguageModelPolicy(load_model("model"), load_tokenizer("model"), EXTRACTION)
        >>> example = build_extraction_dataset("feedback.db", split_by="group").eval[0]
        >>> policy.decide(example.state).action.decision in ("store", "skip", "defer")
        True
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        kind: PolicyKind,
        *,
        name: str = "language model",
        seed: int | None = None,
        tokens_per_batch: int = 8192,
        console: Console | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.kind = kind
        self.name = name
        self._actions = kind.actions()
        self._random = None if seed is None else random.Random(seed)
        self._tokens_per_batch = tokens_per_batch
        self._console = console or Console(quiet=True)
        self._trie_after = functools.lru_cache(maxsize=64)(self._build_trie)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        console: Console | None = None,
    ) -> LanguageModelPolicy:
        """Load what policy training wrote: a model, its tokenizer and ``<policy>_metadata.json``.

        The model may be an adapter; it is put onto its base as that is on disk, not quantized.

        Args:
            path: the folder; the policy's name in reports.
            seed: as for the class.
            device: where to compute; None is a GPU if there is one.
            console: as for the class.

        Raises:
            InputError: the folder holds no policy, one of an unknown kind, or an adapter whose base
                is not found.
        """
        folder = Path(path)
        kind = _read_kind(folder)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        found = find_model(str(folder), None)
        tokenizer = found.load_tokenizer()
        model = found.load(dtype=torch.float32, device=torch.device(device))
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InputError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeddings "
                f"for {model.config.vocab_size}: they do not belong together"
            )
        return cls(model, tokenizer, kind, name=str(path), seed=seed, console=console)

    def decide(self, state: State) -> PolicyDecision:
        """Choose an action.

        Raises:
            InputError: the prompt is too long for the model.
            RunError: the model's numbers are not finite.
        """
        return self.decide_batch([state])[0]

    def decide_batch(self, states: Sequence[State]) -> list[PolicyDecision]:
        """Choose an action for each state, as ``decide`` would; raises as it does."""
        return [self._decision(chances) for chances in self.action_chances(states)]

    def action_chances(self, states: Sequence[State]) -> NDArray[np.float64]:
        """Return the (B, A) chance of each of ``kind.actions()`` in each state; rows add up to 1.

        Raises:
            InputError: a prompt is too long for the model.
            RunError: the model's numbers are not finite.
        """
        log_probs = self.action_log_probs(states)
        if not np.isfinite(log_probs).all():
            raise RunError(f"{self.name}: the model gives log-probs that are not finite")
        odds = np.exp(log_probs - log_probs.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = odds / odds.sum(axis=1, keepdims=True)
        return shares

    def action_log_probs(self, states: Sequence[State]) -> NDArray[np.float64]:
        """Return the (B, A) log-prob, in nats, that the model writes exactly each action's text.

        The exponentials of a row add up to the chance that what it writes freely is one of them.

        Raises:
            InputError: a prompt is too long for the model.
        """
        texts = [self.kind.render_prompt(state) for state in states]
        row_by_text = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        log_probs = self._log_probs_after(list(row_by_text))
        return log_probs[[row_by_text[text] for text in texts]]

    def generate_action(self, state: State, options: GenerateOptions | None = None) -> Action:
        """Let the model write an action freely; ids that it writes are kept.

        Raises:
            InputError: what it wrote is not a valid action, or ``generate`` refuses the prompt.
        """
        generated = self.generate_actions([state], options)
        if generated.faults[0] is not None:
            raise InputError(f"{self.name}: {generated.faults[0]}")
        return generated.actions[0]

    def generate_actions(
        self, states: Sequence[State], options: GenerateOptions | None = None
    ) -> GeneratedActions:
        """Let the model write an action for each state, and tell which are invalid and why.

        Raises:
            InputError: there is no state, or ``generate`` refuses a prompt.
        """
        if not states:
            raise InputError("there are no states to generate actions for")
        prompts = [self.kind.render_prompt(state) for state in states]
        actions: list[Action | None] = []
        faults: list[str | None] = []
        generations = generate(self.model, self.tokenizer, prompts, options)
        for generation in generations:
            try:
                actions.append(_parse(generation, self.kind))
                faults.append(None)
            except InputError as error:
                actions.append(None)
                faults.append(str(error))
        return GeneratedActions(tuple(actions), tuple(faults), tuple(generations))

    def _decision(self, chances: NDArray[np.float64]) -> PolicyDecision:
        beliefs = tuple(chances.tolist())
        if self._random is None:
            index, probabilities = int(chances.argmax()), None
        else:
            index = self._random.choices(range(len(beliefs)), weights=beliefs)[0]
            probabilities = beliefs
        return PolicyDecision(self._actions[index], beliefs[index], probabilities, beliefs)

    def _build_trie(self, last_words: str) -> TokenTrie:
        """Return the tree of all actions' tokens after a prompt that ends with ``last_words``.

        They are those of training: what precedes the last words does not change them (see
        ``Tokenizer.last_cut``).
        """
        texts = [self.kind.render_action(action) for action in self._actions]
        if len({tuple(self.tokenizer.encode(text)) for text in texts}) < len(texts):
            raise InputError(
                f"{self.name}: the tokenizer writes different {self.kind.name} actions alike"
            )
        pairs = [
            PreferencePair(last_words, chosen=text, rejected=texts[index - 1])
            for index, text in enumerate(texts)
        ]
        return build_trie(
            [pair.chosen_ids.tolist() for pair in tokenize_pairs(pairs, self.tokenizer).pairs]
        )

    def _log_probs_after(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the (B, A) log-probs of the actions after B prompts."""
        prompts = encode_prompts(texts, self.tokenizer)
        tries = [self._trie_after(text[self.tokenizer.last_cut(text) :]) for text in texts]
        sizes = []
        for prompt, trie in zip(prompts, tries, strict=True):
            self._check_fit(len(prompt) + trie.depth)
            sizes.append(len(prompt) + trie.tokens)
        log_probs = np.empty((len(texts), len(self._actions)))
        batches = list(_batches(sizes, self._tokens_per_batch))
        console = self._console if len(batches) > 1 else Console(quiet=True)
        with console.bar(self.name, len(texts), unit="states") as bar:
            for rows in batches:
                log_probs[rows] = self._score(prompts[rows], tries[rows])
                bar.update(rows.stop)
        return log_probs

    def _check_fit(self, tokens: int) -> None:
        limit = self.model.config.max_positions
        if tokens > limit:
            raise InputError(
                f"{self.name}: a prompt and an action have {tokens} tokens, the model was made for "
                f"{limit}"
            )

    def _score(
        self, prompts: Sequence[Sequence[int]], tries: Sequence[TokenTrie]
    ) -> NDArray[np.float64]:
        """Return (B, A) log-probs of all actions after each prompt, from one forward pass."""
        ids: list[NDArray[np.int32]] = []
        parents: list[int | None] = []
        scored: list[int] = []
        for prompt, trie in zip(prompts, tries, strict=True):
            root = len(ids)
            ids += [np.array(prompt, np.int32), *trie.segments]
            parents.append(None)
            parents += [root if up is None else root + 1 + up for up in trie.parents]
            scored += range(root + 1, len(ids))
        texts = collate_forest(ids, parents, scored).to(self.model.lm_head.weight.device)
        with torch.inference_mode():
            tokens = completion_log_probs(self.model, texts).log_probs
            sums = texts.sum_per_answer(tokens.double()).cpu().numpy()  # of the tries' segments
        ends = np.cumsum([len(trie.segments) for trie in tries])
        per_trie = zip(tries, np.split(sums, ends[:-1]), strict=True)
        return np.stack([trie.paths @ of_segments for trie, of_segments in per_trie])


class FreePolicy:
    """Writes its answer freely; where that is no valid action, the rules answer and say why.

    The confidence is the probability of exactly the text that was written. Reports count the
    answers of the rules, so the share of invalid ones is seen.

    Args:
        policy: whose model writes.
        options: of writing; None takes the likeliest token each time.
    """

    def __init__(self, policy: LanguageModelPolicy, options: GenerateOptions | None = None) -> None:
        self.policy, self.kind = policy, policy.kind
        self.name = f"free:{policy.name}"
        self._options = options
        self._rules = RulesPolicy(policy.kind)

    def decide(self, state: State) -> PolicyDecision:
        """Write an action; raises as ``decide_batch``."""
        return self.decide_batch([state])[0]

    def decide_batch(self, states: Sequence[State]) -> list[PolicyDecision]:
        """Write an action for each state.

        Raises:
            InputError: there is no state, or ``generate`` refuses a prompt.
        """
        written = self.policy.generate_actions(states, self._options)
        return [
            PolicyDecision(action, math.exp(sum(generation.log_probs)))
            if fault is None
            else replace(self._rules.decide(state), fallback_reason=fault)
            for state, action, fault, generation in zip(
                states, written.actions, written.faults, written.generations, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class GeneratedActions:
    """What a model wrote freely for B states."""

    actions: tuple[Action | None, ...]
    """The action of each state; None where what was written is none."""
    faults: tuple[str | None, ...]
    """What is wrong with it; None where it is a valid action."""
    generations: tuple[Generation, ...]
    """What was written."""

    @property
    def invalid_share(self) -> float:
        """Share of the states for which no valid action was written."""
        return sum(fault is not None for fault in self.faults) / len(self.faults)


def _batches(sizes: Sequence[int], capacity: int) -> Iterator[slice]:
    """Divide items in their order over batches; one that is larger than that stands alone."""
    first = total = 0
    for item, size in enumerate(sizes):
        if first < item and total + size > capacity:
            yield slice(first, item)
            first, total = item, 0
        total += size
    if sizes:
        yield slice(first, len(sizes))


def _parse(generation: Generation, kind: PolicyKind) -> Action:
    if not generation.is_finished:
        raise InputError(
            f"{kind.name} response: not ended after {len(generation.ids)} tokens: "
            f"{generation.text[:_SHOWN_CHARACTERS]!r}"
        )
    return kind.parse_response(generation.text)


def _read_kind(folder: Path) -> PolicyKind:
    """Return the kind that the metadata of a policy name."""
    found = sorted(folder.glob("*_metadata.json"))
    if (folder / "dpo" / "model").is_dir():
        raise InputError(f"{folder} holds a whole training: its policy is {folder / 'dpo/model'}")
    if any(folder.glob("*_examples_eval.jsonl")):
        raise InputError(f"{folder} is a data set, no policy: it is for --data, by its files")
    if len(found) != 1:
        raise InputError(
            f"{folder}: no trained policy: expected a model folder with one "
            f"<policy>_metadata.json, found {len(found)}"
        )
    metadata = read_json(found[0])
    name = metadata.get("policy") if isinstance(metadata, Mapping) else None
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(
            f"{found[0]}: policy {name!r} is of no known kind; known are {', '.join(KINDS)}"
        )
    return KINDS[name]
