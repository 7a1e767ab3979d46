"""How far keys enter the state: fading and write strength, per token and KV head."""

import torch
from torch import Tensor, nn

from .kernels import Gates

# softplus(-7) = 1/1100: at the start the state fades by half in 760 tokens.
DECAY_START = -7.0


class TokenGates(nn.Module):
    """log decay = -softplus(w.x + b) and, for the delta rule, write strength beta = sigmoid(w.x + b), where x is the
    token's key at unit length. w = 0 at the start: the same for all tokens.
    """

    def __init__(self, state: str, kv_heads: int, head_dim: int):
        super().__init__()
        start = [DECAY_START, 0.0] if state == "delta" else [DECAY_START]
        self.weight = nn.Parameter(torch.zeros(kv_heads, head_dim, len(start)))
        self.bias = nn.Parameter(torch.tensor(start).repeat(kv_heads, 1, 1))

    def forward(self, k: Tensor) -> Gates:
        """Gates [B, H_kv, K] in fp32 (fp64 for fp64 inputs) of k [B, H_kv, K, D]."""
        dtype = torch.promote_types(k.dtype, torch.float32)
        # Divided by its length after the product, k is read but twice.
        length = torch.linalg.vector_norm(k, dim=-1, keepdim=True, dtype=dtype).clamp(min=1e-12)
        logits = (k @ self.weight.to(k.dtype)).to(dtype) / length + self.bias.to(dtype)
        log_decay = -nn.functional.softplus(logits[..., 0])
        return Gates(log_decay, logits[..., 1].sigmoid() if logits.shape[-1] > 1 else None)
