"""Linear in length, differentiable, plain PyTorch: documents cut into chunks, one tile per chunk, state in between.

Every document starts a chunk of its own, aligned to its positions. A query in chunk c looks at its own and the
previous chunk and at the sinks token by token (the reference does one such tile), and at chunks <= c - 2 through
their summed state; where it looks both ways, at the next chunk token by token, too, and at chunks >= c + 2 through
theirs. The chunk is a multiple of the window and no shorter than the convolution, so nothing near is further away than
the chunk before or behind.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from ..config import LinearAttentionConfig
from ..tokens import Tokens
from .memory import Gates, State, scan
from .reference import Weights, attend, contract

MIN_CHUNK = 64


def chunk_size(config: LinearAttentionConfig) -> int:
    window = config.window_size if config.window is not None else 1
    return window * -(-max(MIN_CHUNK, config.conv_taps) // window)


class Layout:
    """Slots [B, chunks * C] for tokens [B, T]: each document contiguous, from a chunk boundary, in position order.

    The first document of a row may continue from a cache: then its first positions here can be sinks, followed by a
    gap of tokens that only the state remembers. The gap gets no slots: what follows it starts the next chunk.
    """

    def __init__(self, tokens: Tokens, size: int, sinks: int, causal: bool = True):
        document, position, valid = tokens.document, tokens.position, tokens.valid
        batch, length = position.shape
        device = position.device
        documents = int(document.max()) + 1 if valid.any() else 1

        # (B, documents): first and last position behind the gap; a kept sink is one with later positions missing.
        big = torch.iinfo(position.dtype).max
        index = document.clamp(min=0)
        first = torch.full((batch, documents), big, device=device)
        last = torch.full((batch, documents), -1, device=device)
        body = valid & (position >= sinks)
        first = first.scatter_reduce(1, index, torch.where(body, position, big), "amin")
        last = last.scatter_reduce(1, index, torch.where(valid, position, -1), "amax")
        # Chunks between the sinks' chunk 0 and the first chunk behind it that are not here.
        skipped = torch.where(first < big, (first // size - 1).clamp(min=0), 0)
        chunks = torch.where(last >= 0, last // size + 1 - skipped, 0)
        base = chunks.cumsum(1) - chunks
        self.chunks = max(1, int(chunks.sum(1).max()))

        chunk = position // size
        chunk = torch.where(chunk > 0, chunk - skipped.gather(1, index), chunk) + base.gather(1, index)
        slots = self.chunks * size
        # Padding goes to a slot of its own behind the row.
        self.slot = torch.where(valid, chunk * size + position % size, slots)
        source = torch.full((batch, slots + 1), length, device=device)
        source = source.scatter(1, self.slot, torch.arange(length, device=device).expand(batch, length))
        source = source[:, :slots].view(batch, self.chunks, size)
        self.valid = source < length  # (B, chunks, C)
        rows = torch.arange(batch, device=device)[:, None, None] * length
        self.source = (source.clamp(max=length - 1) + rows).flatten()
        self.target = (self.slot.clamp(max=slots - 1) + rows.squeeze(-1) // length * slots).flatten()
        self.position = position.flatten()[self.source].view(batch, self.chunks, size)

        number = torch.arange(self.chunks, device=device)
        # The document of each chunk: how many documents begin at or before it.
        owner = (number[None, :, None] >= base[:, None, :]).logical_and(chunks[:, None, :] > 0)
        self.document = torch.where(owner, torch.arange(documents, device=device), 0).amax(-1)  # (B, chunks)
        self.first_chunk = base.gather(1, self.document)
        self.index_in_document = number - self.first_chunk
        # (B, chunks): document 0 begins with what the cache holds, every other one with nothing.
        self.carries = (self.index_in_document > 0) | (self.document == 0)
        self.follows = torch.zeros_like(self.document, dtype=torch.bool)  # (B, chunks): the previous chunk's document
        self.follows[:, 1:] = self.document[:, 1:] == self.document[:, :-1]

        self.length = (last + 1).gather(1, self.document)  # (B, chunks), of the chunk's document

        self.sinks, self.causal = sinks, causal

    @classmethod
    def of(cls, tokens: Tokens, size: int, sinks: int, causal: bool = True) -> "Layout":
        """The layout of `tokens`, made once for all layers that share them."""
        key = size, sinks, causal
        if key not in tokens.layouts:
            tokens.layouts[key] = cls(tokens, *key)
        return tokens.layouts[key]

    @cached_property
    def owner(self) -> Tensor | None:
        """[B, chunks, chunks]: one where column is the first chunk of row's document, None where that is chunk 0. A
        product with it picks sinks; the gradient of indexing would sum equal indices one after the other."""
        return nn.functional.one_hot(self.first_chunk, self.chunks) if self.first_chunk.any() else None

    @cached_property
    def is_identity(self) -> bool:
        """One document that fills all slots needs no moving around."""
        index = torch.arange(self.slot.shape[1], device=self.slot.device)
        return self.valid[0].numel() == len(index) and bool((self.slot == index).all())

    @cached_property
    def precedes(self) -> Tensor:
        """[B, chunks], whether the next chunk is of the same document."""
        return nn.functional.pad(self.follows[:, 1:], (0, 1))

    @cached_property
    def visible(self) -> Tensor:
        """[B * chunks, C, sinks + 2 C], of tiles; both ways, of 3 C."""
        batch, chunks, size = self.valid.shape
        own = torch.ones(size, size, dtype=torch.bool, device=self.valid.device)
        parts = [
            # Sinks in the own or previous chunk are there already.
            (self.index_in_document >= 2)[..., None, None].expand(-1, -1, size, self.sinks),
            self.follows[..., None, None].expand(-1, -1, size, size),
            (own.tril() if self.causal else own).expand(batch, chunks, size, size),
        ]
        if not self.causal:
            parts.append(self.precedes[..., None, None].expand(-1, -1, size, size))
        visible = torch.cat(parts, dim=-1).flatten(0, 1)
        return visible & self.tile_tokens(self.valid)[:, None, :]

    @cached_property
    def tile_position(self) -> Tensor:
        """[B * chunks, keys of a tile]."""
        return self.tile_tokens(self.position)

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For kernels: the token of its row in each slot [B, chunks, C], -1 where none is, `first_chunk`, `carries` and
        `follows`."""
        batch, length = self.slot.shape
        row = torch.arange(batch, device=self.source.device)[:, None, None] * length
        token = torch.where(self.valid, self.source.view_as(self.valid) - row, -1)
        return token.int(), self.first_chunk.int(), self.carries.int(), self.follows.int()

    def tile(self, x: Tensor) -> Tensor:
        """[B, chunks, H, C, D] -> [B * chunks, H, sinks + 2 C, D]: the document's sinks, the previous and own chunk;
        both ways, sinks + 3 C, the next one behind them."""
        nowhere = torch.zeros_like(x[:, :1])
        previous, following = torch.cat([nowhere, x[:, :-1]], dim=1), torch.cat([x[:, 1:], nowhere], dim=1)
        sinks = x[..., : self.sinks, :]
        if self.owner is None:
            sinks = sinks[:, :1].expand_as(sinks)
        elif x.is_floating_point():
            sinks = (self.owner.to(x.dtype) @ sinks.flatten(2)).view_as(sinks)
        else:
            sinks = sinks.gather(1, self.first_chunk[..., None, None, None].expand_as(sinks))
        parts = [sinks, previous, x] if self.causal else [sinks, previous, x, following]
        return torch.cat(parts, dim=3).flatten(0, 1)

    def tile_tokens(self, x: Tensor) -> Tensor:
        """The same for [B, chunks, C]."""
        return self.tile(x[:, :, None, :, None]).flatten(1)

    def pack(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, chunks, H, C, D]; empty slots hold some other token's values."""
        batch, heads, length, dim = x.shape
        if self.is_identity:
            return x.unflatten(2, (self.chunks, -1)).transpose(1, 2)
        rows = x.transpose(1, 2).reshape(batch * length, heads * dim).index_select(0, self.source)
        return rows.view(batch, self.chunks, -1, heads, dim).transpose(2, 3)

    def unpack(self, x: Tensor) -> Tensor:
        """[B, chunks, H, C, D] -> [B, H, T, D]."""
        batch, chunks, heads, size, dim = x.shape
        if self.is_identity:
            return x.transpose(1, 2).flatten(2, 3)
        rows = x.transpose(2, 3).reshape(batch * chunks * size, heads * dim).index_select(0, self.target)
        return rows.view(batch, -1, heads, dim).transpose(1, 2)


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    gates: Gates | None,
    layout: Layout,
    state: State | None,
    config: LinearAttentionConfig,
    weights: Weights,
    scale: float,
    sink_q: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Outputs [B, H, T, D_v] of whole sequences, in tiles; arguments as of `attend`, one query per key.

    `state` belongs to document 0 of each row.
    """
    size = chunk_size(config)
    batch, chunks = layout.position.shape[:2]
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, v = layout.pack(q), layout.pack(k), layout.pack(v)

    carried = u = G_q = G_k = None
    if phi_q is not None:
        phi_q = layout.pack(phi_q).flatten(0, 1)
        memory = _Memory(layout, phi_k, v.to(dtype), gates, state, config)
        M, G_q = memory.M, memory.G
        phi_k = None
        aligned = causal and config.window in ("block", "terrace") and config.window_size == size
        if not causal:
            M = memory.outside(layout)
        elif not (aligned and config.window == "block"):
            # The state is that before the previous chunk, where that is the document's.
            follows = layout.follows[:, :, None, None, None]
            M = torch.where(follows, torch.cat([M[:, :1], M[:, :-1]], dim=1), M)
            if G_q is not None:
                previous = torch.cat([torch.zeros_like(G_q[:, :1]), G_q[:, :-1]], dim=1)
                G_q = G_q + previous[..., -1:] * follows[..., 0]
        if not aligned:
            # Some keys of the tile are far.
            phi_k, u = layout.tile(memory.phi_k), layout.tile(memory.u)
            if G_q is not None:
                G_k = layout.tile(memory.G.unsqueeze(-1)).squeeze(-1)
                G_k = torch.cat([G_k[..., :-size], G_q.flatten(0, 1)], dim=-1)
        carried = M.flatten(0, 1)
        G_q = None if G_q is None else G_q.flatten(0, 1)

    v_tile = layout.tile(v)
    out = attend(
        q.flatten(0, 1),
        layout.tile(k),
        v_tile,
        phi_q,
        phi_k,
        u,
        G_q,
        G_k,
        layout.position.flatten(0, 1),
        layout.tile_position,
        layout.visible,
        carried,
        config,
        weights,
        scale,
        sink_q=None if sink_q is None else layout.pack(sink_q).flatten(0, 1),
        bias=bias,
        counts=None if causal else layout.length.flatten()[:, None],
    )
    if weights.conv is not None:
        # The last query sees every key of its tile that the convolution can reach.
        reached = v_tile[:, :, config.sinks :].to(dtype) * layout.visible[:, -1:, config.sinks :, None]
        out = out + _convolve(reached, weights.conv.to(dtype), size)
    return layout.unpack(out.unflatten(0, (batch, chunks)))


class _Memory:
    """The far branch's side of whole sequences, in chunks.

    Attributes:
        phi_k: [B, chunks, H_kv, C, F]; u: [B, chunks, H_kv, C, D_v + 1]; G: [B, chunks, H_kv, C] or None.
        M: [B, chunks, H_kv, F, D_v + 1] before each chunk; end: [B, H_kv, F, D_v + 1] after the last one.
    """

    def __init__(self, layout: Layout, phi_k: Tensor, v: Tensor, gates: Gates | None, state: State | None, config):
        """`v` [B, chunks, H_kv, C, D_v] is packed, `phi_k` and `gates` are not."""
        enters = (layout.valid & (layout.position >= config.sinks))[:, :, None]
        if gates is not None:
            gates = gates.map(lambda x: layout.pack(x.unsqueeze(-1)).squeeze(-1)).where(enters)
        self.phi_k = layout.pack(phi_k).to(v.dtype) * enters.unsqueeze(-1)
        start = None if state is None else state.M
        self.v = v
        self.u, self.M, self.G, self.end = scan(self.phi_k, v, gates, start, layout.carries)

    def outside(self, layout: Layout) -> Tensor:
        """[B, chunks, H_kv, F, D_v + 1], what an additive state has of each document's chunks that are neither in nor
        beside a chunk: those before it and those behind it, as a difference from the whole would be but rounding where
        there are none."""
        follows, precedes = (x[:, :, None, None, None] for x in (layout.follows, layout.precedes))
        before = torch.where(follows, torch.cat([self.M[:, :1], self.M[:, :-1]], dim=1), self.M)
        backwards = (x.flip(1) for x in (self.phi_k, self.v))
        behind = scan(*backwards, None, None, layout.precedes.flip(1))[1].flip(1)
        return before + torch.where(precedes, torch.cat([behind[:, 1:], behind[:, -1:]], dim=1), behind)


def fold_sequence(
    phi_k: Tensor, v: Tensor, gates: Gates | None, state: State, tokens: Tokens, config: LinearAttentionConfig
) -> State:
    """`kernels.fold` for any number of keys."""
    layout = Layout.of(tokens, chunk_size(config), config.sinks)
    return State.of(_Memory(layout, phi_k, layout.pack(v), gates, state, config).end)


def _convolve(v: Tensor, weight: Tensor, size: int) -> Tensor:
    """[N, H, C, D]: the convolution of the second C = `size` of v [N, H_kv, 2 C or 3 C, D], 0 where there is nothing,
    by `weight` [H, K], or, both ways, [H, 2 K - 1]. In a tile the distance of two tokens is that of their slots, so one
    matrix serves all tiles."""
    tiles, kv_heads, length, dim = v.shape
    taps = weight.shape[1] if length == 2 * size else (weight.shape[1] + 1) // 2
    # Row i of the matrix is the filter, last tap first, shifted by i. Indexing would do too, but its gradient sums
    # thousands of equal indices one after the other.
    before = 2 * size - taps
    behind = length + size - 1 - before - weight.shape[1]
    shifted = nn.functional.pad(weight.flip(-1), (before, behind)).unfold(-1, length, 1)
    band = shifted.flip(1)  # (H, C, 2 C or 3 C)
    columns = v.permute(1, 2, 0, 3).reshape(kv_heads, length, tiles * dim)
    out = contract(band[None], columns[None])[0]
    return out.view(len(weight), size, tiles, dim).permute(2, 0, 1, 3)
