"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): head i, from 0, predicts the token i + 2 places ahead."""

import torch
from torch import Tensor, nn


class MedusaHeads(nn.Module):
    """k heads over the last hidden state: x + SiLU(Wx + b), W = 0 at the start, then a vocabulary projection.

    Args:
        hidden_size: of the model; vocab_size: rows of its output projection.
        heads: k.
        projection: "shared" uses the model's own output projection, "own" gives each head a copy to train.
    """

    def __init__(self, hidden_size: int, vocab_size: int, heads: int, projection: str):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(heads))
        for block in self.blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        self.projections = None
        if projection == "own":
            self.projections = nn.ModuleList(nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(heads))

    def copy_projection(self, projection: nn.Linear) -> None:
        """Start own projections from the model's."""
        with torch.no_grad():
            for own in self.projections or []:
                own.weight.copy_(projection.weight)

    def forward(self, hidden: Tensor, projection: nn.Linear) -> list[Tensor]:
        """[B, T, hidden] -> k logits [B, T, V].

        Args:
            projection: the model's output projection.
        """
        logits = []
        for i, block in enumerate(self.blocks):
            x = hidden.to(block.weight.dtype)
            x = x + nn.functional.silu(block(x))
            own = None if self.projections is None else self.projections[i]
            logits.append((own or projection)(x if own is not None else x.to(projection.weight.dtype)))
        return logits
