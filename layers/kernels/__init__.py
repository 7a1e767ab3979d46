"""One entry point, `augmented_attention`, and the backends behind it.

`reference` is the quadratic oracle, `torch` the chunked form that is linear in length, and `triton` fused kernels:
those for additive states where they can, else those for any state's rule. A backend maps a `Problem` to outputs; `auto`
takes the fastest that can do it, the last such entry of `BACKENDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..config import LinearAttentionConfig
from ..tokens import Tokens, visible_keys
from .chunked import Layout, attend_sequence, chunk_size, fold_sequence
from .memory import Gates, State, far_values
from .reference import Blocks, Weights, at_distance, attend, contract, conv_band, normalised  # noqa: F401

# Modules of `fused`, where Triton is there; an exported model's copy gets the package's, as it gets backends.
triton_kernels = SimpleNamespace(step=None, gated=None, features=None, rotate=None, layers=())
if __name__ == "linearize.layers.kernels":
    try:
        from linearize.layers.kernels.fused import additive, features, gated, rotate, step

        triton_kernels = SimpleNamespace(
            step=step, gated=gated, features=features, rotate=rotate, layers=(additive, gated)
        )
    except ImportError:  # no Triton
        pass


@dataclass
class Features:
    """What the far branch sees of queries or keys, computed when it is first asked for: a backend may do without.

    Attributes:
        x: [B, H, T, D], to which `map` is applied.
        unit: whether features are scaled to length 1.
        scale, lam_query: of queries, whose features are multiplied by exp(scale x.lam_query) if there are such weights
            [H, D, 1].
        token_gates: of keys, what makes their gates, if the state's rule has any.
    """

    x: Tensor
    map: nn.Module
    unit: bool = False
    scale: float = 1.0
    lam_query: Tensor | None = None
    token_gates: nn.Module | None = None

    @cached_property
    def _computed(self) -> tuple[Tensor, Gates | None]:
        features = triton_kernels.features
        if features is not None and features.fuses(self.x, self.map):
            return features.hedgehog(self.x, self.map, self.unit, self.scale, self.lam_query, self.token_gates)
        phi = self.map(self.x)
        if self.unit:
            phi = nn.functional.normalize(phi, dim=-1)
        if self.lam_query is not None:
            phi = phi * (self.scale * self.x @ self.lam_query.to(self.x.dtype)).exp()
        return phi, None if self.token_gates is None else self.token_gates(self.x)

    @property
    def phi(self) -> Tensor:
        """[B, H, T, F]."""
        return self._computed[0]

    @property
    def gates(self) -> Gates | None:
        return self._computed[1]

    @property
    def is_computed(self) -> bool:
        return "_computed" in vars(self)

    def part(self, tokens: slice) -> "Features":
        """Of some of the tokens."""
        some = replace(self, x=self.x[:, :, tokens])
        if self.is_computed:
            gates = None if self.gates is None else self.gates.map(lambda x: x[:, :, tokens])
            some._computed = self.phi[:, :, tokens], gates
        return some


@dataclass
class Problem:
    """New tokens (queries) after remembered ones; T new, P remembered token by token, K = P + T keys.

    Attributes:
        q: [B, H, T, D], after the rotary embedding; q_features: of the same, or None without far branch.
        k: [B, H_kv, K, D]; v: [B, H_kv, K, D_v]; k_features: of the keys, or None.
        keys: document and position of the K keys, remembered ones first; the queries are the last T.
        state: sums over the tokens of document 0 that are not among the keys, or None.
        ancestors: [T, T] bool for a draft tree: node i sees remembered tokens and node j where true. None: causal.
        config, weights, scale: the layer.
        sink_q: [B, H, T, D], the queries as sinks see them, or None where that is q.
        bias: [H, 2 R - 1], added to near scores, see `reference.at_distance`; or None.
        rows_of_blocks: [H_kv, R, G] twice, what `linformer` makes of the keys and of the values of each block; or None.
        causal: whether a query sees only what is not after it. Otherwise there is neither past, state nor tree.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_features: Features | None
    k_features: Features | None
    keys: Tokens
    state: State | None
    ancestors: Tensor | None
    config: LinearAttentionConfig
    weights: Weights
    scale: float
    sink_q: Tensor | None = None
    bias: Tensor | None = None
    rows_of_blocks: tuple[Tensor, Tensor] | None = None
    causal: bool = True

    @property
    def past(self) -> int:
        return self.k.shape[2] - self.q.shape[2]

    @property
    def phi_q(self) -> Tensor | None:
        """[B, H, T, F]."""
        return None if self.q_features is None else self.q_features.phi

    @property
    def phi_k(self) -> Tensor | None:
        """[B, H_kv, K, F]."""
        return None if self.k_features is None else self.k_features.phi

    @property
    def gates(self) -> Gates | None:
        """Of the K keys, where the state's rule has any."""
        return None if self.k_features is None else self.k_features.gates


def enter(gates: Gates | None, keys: Tokens, config: LinearAttentionConfig) -> Gates | None:
    """The gates of keys that enter the state one day, zero for padding and sinks."""
    return None if gates is None else gates.where((keys.valid & (keys.position >= config.sinks))[:, None])


def reference(problem: Problem) -> Tensor:
    """[B, H, T, D_v] by the quadratic oracle."""
    past, keys = problem.past, problem.keys
    total = keys.document.shape[1]
    order = torch.ones(total, total, dtype=torch.bool, device=keys.document.device)
    if problem.causal:
        order = order.tril()
    if problem.ancestors is not None:
        order[past:, past:] = problem.ancestors
    seen = visible_keys(keys, total, order) & keys.valid[:, None, :]
    visible = seen[:, past:]
    document = keys.document[:, past:]
    u = G = G_q = None
    if problem.phi_k is not None:
        dtype = torch.promote_types(problem.v.dtype, torch.float32)
        u, G = far_values(
            problem.phi_k.to(dtype),
            problem.v.to(dtype),
            enter(problem.gates, keys, problem.config),
            seen & order.logical_not().mT,
            problem.state,
            keys.document == 0,
        )
        G_q = None if G is None else G[:, :, past:]
    out = attend(
        problem.q,
        problem.k,
        problem.v,
        problem.phi_q,
        problem.phi_k,
        u,
        G_q,
        G,
        keys.position[:, past:],
        keys.position,
        visible,
        None if problem.state is None else problem.state.M,
        problem.config,
        problem.weights,
        problem.scale,
        recalls=document == 0,
        sink_q=problem.sink_q,
        bias=problem.bias,
        blocks=None if problem.rows_of_blocks is None else _blocks(problem, seen[:, past:]),
        counts=None if problem.causal else visible.sum(-1),
    )
    if problem.weights.conv is None:
        return out
    distance = keys.position[:, past:, None] - keys.position[:, None, :]
    first = 0 if problem.causal else 1 - problem.config.conv_taps
    band = conv_band(problem.weights.conv.to(out.dtype), distance, first) * visible[:, None]
    return out + contract(band, problem.v.to(out.dtype))


def _blocks(problem: Problem, visible: Tensor) -> Blocks:
    """The rows of all blocks of `problem`; visible [B, Q, K]. A document's last block may lack tokens, which add
    nothing."""
    tokens, size = problem.keys, problem.config.window_size
    within = tokens.position % size
    # Blocks are numbered through each row by where they begin; padding gets none.
    number = ((within == 0) & tokens.valid).long().cumsum(-1) - 1
    count = int(number.max()) + 1
    member = (number[..., None] == torch.arange(count, device=number.device)) & tokens.valid[..., None]  # (B, T, n)

    def rows(x: Tensor, projection: Tensor) -> Tensor:  # (B, H_kv, T, D), (H_kv, R, G) -> (B, H_kv, n R, D)
        at_token = projection.to(x.dtype)[:, :, within].movedim(2, 0)  # (B, H_kv, R, T)
        spread = torch.einsum("bhrt,btn->bhnrt", at_token, member.to(x.dtype))
        return (spread.flatten(2, 3) @ x).to(x.dtype)

    k, v = (rows(x, projection) for x, projection in zip((problem.k, problem.v), problem.rows_of_blocks, strict=True))
    # A block is seen if its first token is, and is another one than the query's own.
    begins = member & (within == 0)[..., None]
    seen = torch.einsum("bqk,bkn->bqn", visible.to(v.dtype), begins.to(v.dtype)) > 0
    own = number[:, -visible.shape[1] :, None] == torch.arange(count, device=number.device)
    each = problem.rows_of_blocks[0].shape[1]
    return Blocks(k, v, (seen & ~own).repeat_interleave(each, dim=-1))


def chunked(problem: Problem) -> Tensor:
    """[B, H, T, D_v], linear in T; a few new tokens or a tree are one tile for the oracle."""
    if problem.ancestors is not None or problem.q.shape[2] <= chunk_size(problem.config):
        return reference(problem)

    def after_past(x):  # remembered tokens take part as keys; their outputs are dropped
        return x if not problem.past else torch.cat([x.new_zeros(*x.shape[:2], problem.past, x.shape[3]), x], dim=2)

    out = attend_sequence(
        after_past(problem.q),
        problem.k,
        problem.v,
        None if problem.phi_q is None else after_past(problem.phi_q),
        problem.phi_k,
        problem.gates,
        Layout.of(problem.keys, chunk_size(problem.config), problem.config.sinks, problem.causal),
        problem.state,
        problem.config,
        problem.weights,
        problem.scale,
        None if problem.sink_q is None else after_past(problem.sink_q),
        problem.bias,
        problem.causal,
    )
    return out[:, :, problem.past :]


def fold(features: Features, v: Tensor, state: State, tokens: Tokens, config: LinearAttentionConfig) -> State:
    """The state after some keys have entered it.

    Args:
        features: of the keys; v: [B, H_kv, K, D_v].
        tokens: of the keys, all of document 0 or else padding, which does not enter; neither do sinks.
    """
    many = v.shape[2] > chunk_size(config)
    gated = triton_kernels.gated
    # The few that leave in a decoding step do so in single precision.
    if (many or tokens.whole) and gated is not None and gated.folds(features, v, config):
        return gated.end_state(features, v, state, tokens, config)
    dtype = state.S.dtype
    phi_k, v, gates = features.phi.to(dtype), v.to(dtype), features.gates
    # As `_without_autocast`.
    with torch.autocast(v.device.type, enabled=False):
        if many:
            return fold_sequence(phi_k, v, gates, state, tokens, config)
        enters = tokens.valid & (tokens.position >= config.sinks)
        gates = enter(gates, tokens, config)
        order = torch.ones(2 * enters.shape[1:], dtype=torch.bool, device=v.device).tril(-1)
        u, G = far_values(phi_k, v, gates, order & enters[:, None, :], state, enters)
        phi_k, M = phi_k * enters[:, None, :, None], state.M
        if G is not None:
            # Ragged rows end before the last key; what is behind their end does not fade.
            end = gates.log_decay.sum(-1, keepdim=True)
            phi_k, M = phi_k * (end - G).exp().unsqueeze(-1), M * end.exp().unsqueeze(-1)
        return State.of(M + phi_k.mT @ u)


@dataclass(frozen=True)
class Backend:
    """`run` gives outputs [B, H, T, D_v]. `refuses` says why it cannot take a problem, or None."""

    run: Callable[[Problem], Tensor]
    refuses: Callable[[Problem], str | None] = lambda problem: None


def _without_autocast(run: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    """Autocast would round a backend's sums; feature maps are the caller's, and follow it."""

    def run_without(problem: Problem) -> Tensor:
        _ = problem.phi_q, problem.phi_k
        with torch.autocast(problem.v.device.type, enabled=False):
            return run(problem)

    return run_without


def _chunked_refuses(problem: Problem) -> str | None:
    far = problem.config.far
    return None if far == "features" else f"far: {far} weighs each key or block by itself, which no sum stands for"


def _fused(problem: Problem) -> Tensor:
    return next(layer for layer in triton_kernels.layers if not layer.refuses(problem)).attention(problem)


def _fused_refuses(problem: Problem) -> str | None:
    if not problem.v.is_cuda:
        return "Triton's kernels need a GPU"
    reasons = [layer.refuses(problem) for layer in triton_kernels.layers]
    return None if None in reasons else "; ".join(dict.fromkeys(reasons))


BACKENDS = {
    "reference": Backend(_without_autocast(reference)),
    "torch": Backend(_without_autocast(chunked), _chunked_refuses),
}
if triton_kernels.layers:
    BACKENDS["triton"] = Backend(_fused, _fused_refuses)


def backend_for(problem: Problem, backend: str = "auto") -> str:
    """Name of the backend that takes `problem`.

    Raises:
        ValueError: for a backend that does not exist, or cannot do this.
    """
    if backend == "auto":
        return next(name for name, found in reversed(BACKENDS.items()) if not found.refuses(problem))
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist; choose auto or one of {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].refuses(problem)
    if reason:
        raise ValueError(f"attention backend {backend} cannot do this: {reason}; choose auto")
    return backend


def augmented_attention(problem: Problem, backend: str = "auto") -> Tensor:
    """Outputs [B, H, T, D_v] in the dtype of v; raises as `backend_for`."""
    return BACKENDS[backend_for(problem, backend)].run(problem).to(problem.v.dtype)


__all__ = [
    "BACKENDS", "Backend", "Features", "Gates", "Problem", "State", "Weights", "augmented_attention", "backend_for",
    "fold", "triton_kernels",
]  # fmt: skip
