"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): head i, from 0, predicts the token i + 2 places ahead."""

from copy import deepcopy

from torch import Tensor, nn


class MedusaHeads(nn.Module):
    """k heads over the last hidden state: x + SiLU(Wx + b), W = 0 at the start, then a vocabulary projection.

    Args:
        output: the model's output projection, [hidden -> vocabulary].
        heads: k.
        projection: "shared" uses the model's own output projection, "own" gives each head a copy to train.
    """

    def __init__(self, output: nn.Linear, heads: int, projection: str):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Linear(output.in_features, output.in_features, device=output.weight.device) for _ in range(heads)
        )
        for block in self.blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        self.projections = None
        if projection == "own":
            # The model that it is copied from may be frozen.
            self.projections = nn.ModuleList(deepcopy(output).float().requires_grad_(True) for _ in range(heads))

    def forward(self, hidden: Tensor, output: nn.Linear, heads: int | None = None) -> list[Tensor]:
        """[B, T, hidden] -> logits [B, T, V] of each head.

        Args:
            output: the model's output projection.
            heads: the first so many alone; None: all.
        """
        logits = []
        for i, block in enumerate(self.blocks[:heads]):
            x = hidden.to(block.weight.dtype)
            x = x + nn.functional.silu(block(x))
            projection = output if self.projections is None else self.projections[i]
            logits.append(projection(x.to(projection.weight.dtype)))
        return logits
