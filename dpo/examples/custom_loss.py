"""A loss of your own: any function from the log-probs of P pairs to P values."""

# %% Tokens of a few pairs, and a policy.
import torch.nn.functional as F
from torch import Tensor

from dpo import PreferencePair, TrainConfig, Trainer, tokenize_pairs
from dpo.losses import PairLogProbs
from dpo.models.tiny import make_tiny_model
from dpo.tokenizer import byte_tokenizer

tokenizer = byte_tokenizer()
pairs = tokenize_pairs(
    [PreferencePair(f"{n} + 1 =", f" {n + 1}", " I do not know") for n in range(16)], tokenizer
).pairs
policy = make_tiny_model(tokenizer, seed=0)


# %% The loss. What it sees is explained in dpo.losses.PairLogProbs.
def capped(pairs: PairLogProbs, beta: float = 0.1, cap: float = 5.0) -> Tensor:
    """DPO's loss, of a gap that counts up to ``cap`` nats: pairs that are learned stop pulling."""
    return -F.logsigmoid(beta * pairs.log_ratio_gap.clamp(max=cap))


# %% Train with it: one argument. On the command line: --loss dpo.examples.custom_loss:capped
config = TrainConfig(batch_size=8, steps=12, learning_rate=3e-5)
losses: list[float] = []
for step in Trainer(policy, pairs, config, loss=capped):
    if step.metrics is not None:
        losses.append(step.metrics["loss"])
        print(f"step {step.number}: loss {losses[-1]:.4f}")
