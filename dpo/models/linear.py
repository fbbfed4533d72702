"""Layers of torch that draw no numbers where there is no memory for them.

Drawing on the meta device imports torch's compiler, which takes as long as the import of torch.
"""

from torch import nn


class Linear(nn.Linear):
    """A linear layer."""

    def reset_parameters(self) -> None:
        """Draw the weights, if there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """A table of vectors."""

    def reset_parameters(self) -> None:
        """Draw the vectors, if there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()
