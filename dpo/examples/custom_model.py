"""A model of your own: any module that follows ``dpo.policy.Policy``, here a recurrent one."""

# %% A policy maps a stream of N tokens to (N, D) hidden states, and says how these become logits.
import torch
from torch import Tensor, nn

from dpo import PreferencePair, TrainConfig, Trainer, score_pairs, tokenize_pairs
from dpo.policy import OutputHead
from dpo.segments import TokenStream
from dpo.tokenizer import byte_tokenizer


class RecurrentPolicy(nn.Module):
    """A GRU.

    The stream is a tree of segments: a prompt, and its answers as branches. A branch goes on from
    the state that the segment above it ended in, so a prompt is computed once for all its answers.
    """

    def __init__(self, vocab_size: int, size: int = 64) -> None:
        """Make an untrained one; ``size`` is D."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size)
        self.gru = nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(size, vocab_size)

    def forward(self, stream: TokenStream) -> Tensor:
        """Return the hidden states, (N, D), each of which predicts the next token."""
        segments = stream.plan.segments
        inputs = self.embedding(stream.input_ids).split(list(segments.lengths))  # (length, D) each
        hidden: list[Tensor] = []
        for part, parent in zip(inputs, segments.parents, strict=True):
            start = None if parent is None else hidden[parent][-1:]  # (1, D)
            hidden.append(self.gru(part, start)[0])  # (length, D)
        return torch.cat(hidden)

    def output_head(self) -> OutputHead:
        """Return the map from hidden states to logits."""
        return OutputHead(self.head.weight, self.head.bias)


# %% It trains, evaluates, checkpoints and scores as any other.
tokenizer = byte_tokenizer()
pairs = tokenize_pairs(
    [PreferencePair(f"{n} + 1 =", f" {n + 1}", " I do not know") for n in range(16)], tokenizer
).pairs
torch.manual_seed(0)
policy = RecurrentPolicy(tokenizer.vocab_size)
trainer = Trainer(policy, pairs, TrainConfig(batch_size=8, steps=10, learning_rate=1e-2))
trainer.train()
margins = [score.margin for score in score_pairs(policy, pairs, trainer.batches.reference)]
print("margins after training:", ", ".join(f"{margin:.2f}" for margin in margins if margin))
