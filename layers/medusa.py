"""Draft heads: head i, from 0, predicts the token i + 2 places after the one that the last hidden state h is of.

Medusa (Cai et al. 2024, arXiv 2401.10774) has x_i = h + SiLU(W_i h + b_i). Sequential heads (Hydra; Ankner et al. 2024,
arXiv 2402.05109) see the token before the one that they predict, too, the next one or a guess, embedded as e_i:
x_i = x_{i-1} + SiLU(W_i [x_{i-1}, e_i] + b_i) with x_{-1} = h.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn


class MedusaHeads(nn.Module):
    """k heads, W = 0 at the start; logits are a projection of x_i.

    Args:
        output: the model's output projection, [hidden -> vocabulary].
        heads: k.
        projection: "shared" uses the model's own output projection, "own" gives each head a copy to train.
        sequential: whether heads see the token before.
    """

    def __init__(self, output: nn.Linear, heads: int, projection: str, sequential: bool = False):
        super().__init__()
        size, device, self.sequential = output.in_features, output.weight.device, sequential
        self.blocks = nn.ModuleList(nn.Linear(size * (1 + sequential), size, device=device) for _ in range(heads))
        for block in self.blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        self.projections = None
        if projection == "own":
            # The model that it is copied from may be frozen.
            self.projections = nn.ModuleList(deepcopy(output).float().requires_grad_(True) for _ in range(heads))

    def state(self, head: int, before: Tensor, embedded: Tensor) -> Tensor:
        """x_i [.., hidden].

        Args:
            before: x_{i-1} of sequential heads, else h; embedded: e_i.
        """
        block = self.blocks[head]
        before = before.to(block.weight.dtype)
        seen = torch.cat([before, embedded.to(before.dtype)], dim=-1) if self.sequential else before
        return before + nn.functional.silu(block(seen))

    def logits(self, head: int, state: Tensor, output: nn.Linear) -> Tensor:
        """[.., V] of x_i; output: the model's output projection."""
        projection = output if self.projections is None else self.projections[head]
        return projection(state.to(projection.weight.dtype))

    def forward(self, hidden: Tensor, output: nn.Linear, embedded: Tensor) -> list[Tensor]:
        """Logits [B, T, V] of each head behind each token of a text; anything where the text has ended before.

        Args:
            hidden: [B, T, C]; output: the model's output projection; embedded: [B, T, C], of the same tokens.
        """
        found, state = [], hidden
        for head in range(len(self.blocks)):
            # What comes so many places further on.
            ahead = nn.functional.pad(embedded[:, head + 1 :], (0, 0, 0, min(head + 1, embedded.shape[1])))
            state = self.state(head, state if self.sequential else hidden, ahead)
            found.append(self.logits(head, state, output))
        return found
