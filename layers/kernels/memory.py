"""What the far branch remembers: the rules by which keys and values enter the state M = [S, z].

Key j, unit of time j, leaves u_j = [.., D_v + 1] at phi_k_j, and all that was there fades by exp(g_j):

    M_j = exp(g_j) M_{j-1} + phi_k_j^T u_j        b_ij = phi_q_i . phi_k_j exp(G_i - G_j),  G_j = sum_{l<=j} g_l
    additive, decay:  u_j = [v_j, 1]               (g = 0 for additive)
    delta:            u_j = beta_j ([v_j, 1] - exp(g_j) phi_k_j M_{j-1})    the gated delta rule (arXiv 2412.06464)

so far outputs and far mass are sums of b_ij u_ij whatever the rule. With A_jl = beta_j phi_k_j.phi_k_l exp(G_j - G_l)
for l < j the delta rule's values solve (I + A) u = beta ([v, 1] - exp(G) phi_k M_0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

try:
    from linearize.layers.kernels.fused.delta_scan import delta_scan, solve_unit_lower
except ImportError:  # no Triton, or an exported model's copy without the package
    delta_scan = solve_unit_lower = None

# Chunks whose sums are taken as one product.
BLOCK = 32


@dataclass
class State:
    """What a layer remembers of tokens that it no longer holds: S [N, H_kv, F, D_v] and z [N, H_kv, F], fp32."""

    S: Tensor
    z: Tensor

    @property
    def M(self) -> Tensor:
        """[N, H_kv, F, D_v + 1]."""
        return torch.cat([self.S, self.z.unsqueeze(-1)], dim=-1)

    @classmethod
    def of(cls, M: Tensor) -> "State":
        return cls(M[..., :-1].contiguous(), M[..., -1].contiguous())


@dataclass
class Gates:
    """Per key, [N, H_kv, K]: log_decay g <= 0, and the write strength beta of the delta rule (None: additive)."""

    log_decay: Tensor
    beta: Tensor | None

    def where(self, writes: Tensor) -> "Gates":
        """Keys that do not enter the state (`writes` False) change nothing."""
        return Gates(*(None if x is None else torch.where(writes, x, 0.0) for x in (self.log_decay, self.beta)))

    def map(self, function) -> "Gates":
        return Gates(function(self.log_decay), None if self.beta is None else function(self.beta))


def with_mass(v: Tensor) -> Tensor:
    """[v, 1]: the last column adds up to the mass of the keys."""
    return nn.functional.pad(v, (0, 1), value=1.0)


def fade(G: Tensor, G_k: Tensor) -> Tensor:
    """exp(G_i - G_j) [.., Q, K], never above 1: what is not before i is masked elsewhere."""
    return (G.unsqueeze(-1) - G_k.unsqueeze(-2)).clamp(max=0).exp()


def solve_delta(phi_k: Tensor, values: Tensor, gates: Gates, G: Tensor, precedes: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule within one stretch of keys: u = u_0 - W M for the state M before it.

    Args:
        phi_k: [.., K, F]; values: [.., K, D_v + 1]; gates, G: [.., K].
        precedes: [.., K, K], whether key l (column) enters the state before key j; l < j wherever true.

    Returns:
        u_0 [.., K, D_v + 1] and W [.., K, F].
    """
    A = gates.beta.unsqueeze(-1) * (phi_k @ phi_k.mT) * fade(G, G) * precedes
    faded = phi_k * G.unsqueeze(-1).exp()
    right = torch.cat([values, faded], dim=-1) * gates.beta.unsqueeze(-1)
    if _fits_kernel(A):
        solved = solve_unit_lower(A, right)
    else:
        # Only what is below the diagonal is read: with unitriangular that is I + A.
        solved = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
    return solved[..., : values.shape[-1]], solved[..., values.shape[-1] :]


def far_values(
    phi_k: Tensor, v: Tensor, gates: Gates | None, precedes: Tensor, state: State | None, recalls: Tensor
) -> tuple[Tensor, Tensor | None]:
    """u [N, H_kv, K, D_v + 1] and G [N, H_kv, K] of keys in any order of descent, quadratic in K.

    Args:
        phi_k: [N, H_kv, K, F]; v: [N, H_kv, K, D_v]; gates: of the keys, those that do not enter zeroed.
        precedes: [N, K, K], as in `solve_delta`.
        state: from before all keys; recalls: [N, K], whether a key's document is the state's.
    """
    values = with_mass(v)
    if gates is None:
        return values, None
    precedes = precedes[:, None].to(v.dtype)
    g = gates.log_decay.unsqueeze(-1)
    G = (precedes @ g + g).squeeze(-1)
    if gates.beta is None:
        return values, G
    u, W = solve_delta(phi_k, values, gates, G, precedes)
    if state is not None:
        u = u - (W * recalls[:, None, :, None]) @ state.M
    return u, G


def scan(
    phi_k: Tensor, v: Tensor, gates: Gates | None, start: Tensor | None, carries: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Chunks one after the other.

    Args:
        phi_k: [B, n, H_kv, C, F], zero for keys that do not enter; v: [B, n, H_kv, C, D_v]; gates: [B, n, H_kv, C].
        start: [B, H_kv, F, D_v + 1], M before the first chunk, or None.
        carries: [B, n] bool, False where a chunk begins with an empty state (a new document).

    Returns:
        u [B, n, H_kv, C, D_v + 1]; M before each chunk [B, n, H_kv, F, D_v + 1]; G within each chunk [B, n, H_kv, C]
        (None without gates); M after the last chunk.
    """
    values = with_mass(v)
    G = W = None
    if gates is None:
        added = phi_k.mT @ values
    else:
        G = gates.log_decay.cumsum(-1)
        leaving = phi_k * (G[..., -1:] - G).exp().unsqueeze(-1)
        total = G[..., -1].exp()
        if gates.beta is None:
            added = leaving.mT @ values
        else:
            size = phi_k.shape[-2]
            precedes = torch.ones(size, size, dtype=v.dtype, device=v.device).tril(-1)
            values, W = solve_delta(phi_k, values, gates, G, precedes)
    M = phi_k.new_zeros(*phi_k.shape[:1], *phi_k.shape[2:3], phi_k.shape[-1], v.shape[-1] + 1)
    if start is not None:
        M = start.to(M.dtype)
    if W is None:
        before, M = _sums_before(added, None if gates is None else G[..., -1], M, carries)
        return values, before, G, M
    step_through = delta_scan if _fits_kernel(W) else walk
    u, before, M = step_through(values, W, leaving, total, M, carries)
    return u, before, G, M


def _fits_kernel(x: Tensor) -> bool:
    """Whether Triton can take x [.., C, C or F]: chunks of 16 to 64 keys, up to 256 features, powers of 2."""
    limits = zip(x.shape[-2:], (64, 256), strict=True)
    fits = all(16 <= size <= limit and size & (size - 1) == 0 for size, limit in limits)
    return fits and delta_scan is not None and x.is_cuda and x.dtype == torch.float32


def walk(
    u0: Tensor, W: Tensor, leaving: Tensor, total: Tensor, M: Tensor, carries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`delta_scan` in torch."""
    before, u = [], []
    for chunk in range(u0.shape[1]):
        M = M * carries[:, chunk, None, None, None]
        before.append(M)
        u.append(u0[:, chunk] - W[:, chunk] @ M)
        M = M * total[:, chunk, :, None, None] + leaving[:, chunk].mT @ u[-1]
    return torch.stack(u, dim=1), torch.stack(before, dim=1), M


def _sums_before(added: Tensor, log_decay: Tensor | None, M: Tensor, carries: Tensor) -> tuple[Tensor, Tensor]:
    """M before each chunk and after the last, of M_{c+1} = carries_c exp(log_decay_c) M_c + added_c: blocks of chunks
    as one product each, the sums carried from block to block.

    Args:
        added: [B, n, H_kv, F, D_v + 1]; log_decay: [B, n, H_kv] or None; M: before chunk 0; carries: [B, n].
    """
    before = []
    for start in range(0, added.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        x = torch.cat([M.unsqueeze(1), added[:, part]], dim=1).movedim(1, 2)  # (B, H_kv, n + 1, F, D_v + 1)
        # Row c, column j: what is left of x_j before chunk c.
        breaks = nn.functional.pad((~carries[:, part]).long().cumsum(1), (1, 0))
        left = (breaks.unsqueeze(-1) == breaks.unsqueeze(-2)).tril()[:, None].to(x.dtype)
        if log_decay is not None:
            summed = nn.functional.pad(log_decay[:, part].cumsum(1), (0, 0, 1, 0)).movedim(1, 2)
            left = left * fade(summed, summed)
        sums = (left @ x.flatten(-2)).view_as(x).movedim(2, 1)
        before.append(sums[:, :-1] * carries[:, part, None, None, None])
        M = sums[:, -1]
    return torch.cat(before, dim=1), M
