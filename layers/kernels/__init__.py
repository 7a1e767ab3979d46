"""One entry point, `augmented_attention`, and the backends behind it.

`reference` is the quadratic oracle, `torch` the chunked form that is linear in length. A backend is a function from
`Problem` to outputs; `auto` takes the fastest one there is, the last entry of `BACKENDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LinearAttentionConfig
from ..tokens import Tokens, visible_keys
from .chunked import attend_sequence, chunk_size
from .reference import State, Weights, attend, contract, conv_band


@dataclass
class Problem:
    """New tokens (queries) after remembered ones; T new, P remembered token by token, K = P + T keys.

    Attributes:
        q: [B, H, T, D], after the rotary embedding; phi_q: [B, H, T, F] or None without far branch.
        k: [B, H_kv, K, D]; v: [B, H_kv, K, D_v]; phi_k: [B, H_kv, K, F] or None.
        keys: document and position of the K keys, remembered ones first; the queries are the last T.
        state: sums over the tokens of document 0 that are not among the keys, or None.
        ancestors: [T, T] bool for a draft tree: node i sees remembered tokens and node j where true. None: causal.
        config, weights, scale: the layer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    keys: Tokens
    state: State | None
    ancestors: Tensor | None
    config: LinearAttentionConfig
    weights: Weights
    scale: float

    @property
    def past(self) -> int:
        return self.k.shape[2] - self.q.shape[2]


def reference(problem: Problem) -> Tensor:
    """[B, H, T, D_v] by the quadratic oracle."""
    past, keys = problem.past, problem.keys
    document = keys.document[:, past:]
    visible = visible_keys(keys, document.shape[1], problem.ancestors) & keys.valid[:, None, :]
    out = attend(
        problem.q,
        problem.k,
        problem.v,
        problem.phi_q,
        problem.phi_k,
        keys.position[:, past:],
        keys.position,
        visible,
        problem.state,
        problem.config,
        problem.weights,
        problem.scale,
        recalls=document == 0,
    )
    if problem.weights.conv is None:
        return out
    distance = keys.position[:, past:, None] - keys.position[:, None, :]
    band = conv_band(problem.weights.conv.to(out.dtype), distance) * visible[:, None]
    return out + contract(band, problem.v.to(out.dtype))


def chunked(problem: Problem) -> Tensor:
    """[B, H, T, D_v], linear in T; a few new tokens or a tree are one tile of the reference."""
    if problem.ancestors is not None or problem.q.shape[2] <= chunk_size(problem.config):
        return reference(problem)

    def after_past(x):  # remembered tokens take part as keys; their outputs are dropped
        return torch.cat([x.new_zeros(*x.shape[:2], problem.past, x.shape[3]), x], dim=2)

    out = attend_sequence(
        after_past(problem.q),
        problem.k,
        problem.v,
        None if problem.phi_q is None else after_past(problem.phi_q),
        problem.phi_k,
        problem.keys,
        problem.state,
        problem.config,
        problem.weights,
        problem.scale,
    )
    return out[:, :, problem.past :]


BACKENDS: dict[str, Callable[[Problem], Tensor]] = {"reference": reference, "torch": chunked}


def augmented_attention(problem: Problem, backend: str = "auto") -> Tensor:
    """Outputs [B, H, T, D_v] in the dtype of v.

    Raises:
        ValueError: for a backend that does not exist.
    """
    name = next(reversed(BACKENDS)) if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist; choose auto or one of {', '.join(BACKENDS)}")
    # Backends choose their own precision: autocast would round their sums.
    with torch.autocast(problem.v.device.type, enabled=False):
        return BACKENDS[name](problem).to(problem.v.dtype)


__all__ = ["BACKENDS", "Problem", "State", "Weights", "augmented_attention"]
