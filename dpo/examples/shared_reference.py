"""Ten runs, one reference: betas and losses differ, the reference is computed once."""

# %% A cache is named by the weights and the arithmetic of the reference, and by nothing else.
import tempfile
from pathlib import Path

from dpo import (
    PreferencePair,
    ReferenceCache,
    TrainConfig,
    Trainer,
    reference_log_probs,
    tokenize_pairs,
)
from dpo.fingerprint import module_fingerprint
from dpo.losses import make_loss
from dpo.models.tiny import make_tiny_model
from dpo.reference import numerics
from dpo.tokenizer import byte_tokenizer

tokenizer = byte_tokenizer()
pairs = tokenize_pairs(
    [PreferencePair(f"{n} + 1 =", f" {n + 1}", " I do not know") for n in range(16)], tokenizer
).pairs
start = make_tiny_model(tokenizer, seed=0)
cache = ReferenceCache(
    Path(tempfile.mkdtemp()),  # a folder of your own keeps it for the next program too
    model="tiny",
    fingerprint=module_fingerprint(start, {}),
    numerics=numerics(precision="float32", device="cpu"),
)

# %% Ten runs. Only the first finds rows that are missing in the cache.
computed: list[int] = []
for name in ("sigmoid", "ipo"):
    for beta in (0.01, 0.03, 0.1, 0.3, 1.0):
        policy = make_tiny_model(tokenizer, seed=0)
        computed.append(len(cache.missing(pairs)))
        reference = reference_log_probs(policy, pairs, cache)
        config = TrainConfig(batch_size=8, steps=3, learning_rate=1e-3)
        loss = make_loss(name, beta=beta)
        trainer = Trainer(policy, pairs, config, loss=loss, reference=reference)
        trainer.train()
        print(f"{name}, beta {beta}: computed the reference of {computed[-1]} pairs")
