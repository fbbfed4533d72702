"""Active learning: ask people about the pairs whose margins are least certain."""

# %% A pool of prompts with two answers each, of which nobody has said which is the better.
from collections.abc import Sequence

from dpo import PreferencePair, TrainConfig, Trainer, reference_log_probs, score_pairs
from dpo.models.tiny import make_tiny_model
from dpo.tokenization import TokenizedPairs, tokenize_pairs
from dpo.tokenizer import byte_tokenizer

pool = [PreferencePair(f"{n} + 1 =", f" {n + 1}", f" {n - 1}", id=f"{n}") for n in range(48)]


def better_first(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Stand for the people: here, the greater number is better."""
    return [
        pair
        if int(str(pair.chosen)) > int(str(pair.rejected))
        else PreferencePair(pair.prompt, pair.rejected, pair.chosen, id=pair.id)
        for pair in pairs
    ]


# %% Rounds of: train on what is labelled, score the rest, ask about the smallest margins.
tokenizer = byte_tokenizer()
start = make_tiny_model(tokenizer, seed=0).state_dict()
config = TrainConfig(batch_size=8, epochs=3, learning_rate=1e-3)
labelled: list[PreferencePair] = []
asked = list(pool[:8])
policy = make_tiny_model(tokenizer, seed=0)


def tokens(pairs: Sequence[PreferencePair]) -> TokenizedPairs:
    """Tokenize some pairs."""
    return tokenize_pairs(pairs, tokenizer).pairs


for number in range(3):
    labelled += better_first(asked)
    policy.load_state_dict(start)  # from the start again: the rounds differ by their labels alone
    rest = [pair for pair in pool if pair.id not in {known.id for known in labelled}]
    reference = reference_log_probs(policy, tokens(rest))
    Trainer(policy, tokens(labelled), config).train()
    margin_by_id = {
        score.id: abs(score.margin or 0.0) for score in score_pairs(policy, tokens(rest), reference)
    }
    asked = sorted(rest, key=lambda pair: margin_by_id[str(pair.id)])[:8]
    told = ", ".join(f"{pair.id} ({margin_by_id[str(pair.id)]:.3f})" for pair in asked)
    print(f"round {number + 1}: {len(labelled)} labels; next to ask about: {told}")
