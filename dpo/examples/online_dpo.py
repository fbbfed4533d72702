"""Online DPO: write two answers, let a function of yours judge, train on the pair; and again."""

# %% A policy, the reference that it starts from, and a judge.
import copy
import tempfile
from pathlib import Path

import torch

from dpo import PreferencePair, ReferenceCache, TrainConfig, reference_log_probs, tokenize_pairs
from dpo.fingerprint import module_fingerprint
from dpo.generate import GenerateOptions, Generation, encode_prompts, generate
from dpo.losses import make_loss
from dpo.models.tiny import make_tiny_model
from dpo.pair import Tokens
from dpo.reference import numerics
from dpo.scoring import MicroBatches, score_batch
from dpo.tokenizer import byte_tokenizer

tokenizer = byte_tokenizer()
policy = make_tiny_model(tokenizer, seed=0)
reference_model = copy.deepcopy(policy).requires_grad_(False)
prompts = [f"Letter {n}: " for n in range(16)]


def judge(prompt: str, answer: str) -> float:
    """Stand for a reward model or a person: the more vowels the better."""
    return sum(character in "aeiou" for character in answer) / max(1, len(answer))


# %% The reference's log-probs of new answers are computed once and kept; known ones are looked up.
cache = ReferenceCache(
    Path(tempfile.mkdtemp()),
    model="the start",
    fingerprint=module_fingerprint(reference_model, {}),
    numerics=numerics(precision="float32", device="cpu"),
)

# %% Rounds. The optimizer lives through all of them, and what is trained on are the tokens that
# were drawn, not a text that might be tokenized in another way.
prompt_ids = [Tokens(tuple(ids)) for ids in encode_prompts(prompts, tokenizer)]
loss_of = make_loss("sigmoid", beta=0.1)
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
rewards: list[float] = []
for number in range(8):
    drawn: list[list[Generation]] = []
    for draw in range(2):
        options = GenerateOptions(max_new_tokens=8, temperature=1.0, seed=2 * number + draw)
        drawn.append(generate(policy, tokenizer, prompts, options))
    new: list[PreferencePair] = []
    scores: list[float] = []
    for prompt, ids, first, second in zip(prompts, prompt_ids, *drawn, strict=True):
        one, other = judge(prompt, first.text), judge(prompt, second.text)
        scores += [one, other]
        if one != other:  # of answers that are as good as each other there is nothing to learn
            better, worse = (first, second) if one > other else (second, first)
            new.append(PreferencePair(ids, Tokens(better.ids), Tokens(worse.ids)))
    rewards.append(sum(scores) / len(scores))
    print(f"round {number + 1}: {len(new)} pairs, mean reward {rewards[-1]:.3f}")
    pairs = tokenize_pairs(new, tokenizer).pairs
    reference = reference_log_probs(reference_model, pairs, cache)
    batches = MicroBatches.of_run(TrainConfig(), pairs, reference)
    optimizer.zero_grad()
    for rows in batches.split(range(len(pairs))):
        scored = score_batch(policy, batches.collate(rows), loss_of)
        (loss_of(scored.loss_pairs).sum() / len(pairs)).backward()
    optimizer.step()
