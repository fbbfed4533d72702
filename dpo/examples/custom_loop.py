"""A loop of your own: the trainer's mathematics in a dozen lines, to change as you like."""

# %% Pairs, a policy, and the log-probs of the reference, which is the policy as it starts.
import torch

from dpo import PreferencePair, collate, reference_log_probs, tokenize_pairs
from dpo.losses import make_loss
from dpo.models.tiny import make_tiny_model
from dpo.scoring import score_batch
from dpo.tokenizer import byte_tokenizer

tokenizer = byte_tokenizer()
pairs = tokenize_pairs(
    [PreferencePair(f"{n} + 1 =", f" {n + 1}", " I do not know") for n in range(16)], tokenizer
).pairs
policy = make_tiny_model(tokenizer, seed=0)
reference = reference_log_probs(policy, pairs)

# %% The loop. Micro-batches would add up their gradients before the step.
rows_of_steps = [range(len(pairs))] * 8  # of these few pairs all in each step; any order will do
loss_of = make_loss("sigmoid", beta=0.1)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
losses: list[float] = []
for rows in rows_of_steps:
    batch = collate([pairs[row] for row in rows], reference=[reference[row] for row in rows])
    scored = score_batch(policy, batch, loss_of)
    loss = (batch.weight * loss_of(scored.loss_pairs)).sum() / batch.weight.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
    print(f"step {len(losses)}: loss {losses[-1]:.4f}")
