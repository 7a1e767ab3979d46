"""Linear in length, differentiable, plain PyTorch: documents cut into chunks, one tile per chunk, state in between.

Every document starts a chunk of its own, aligned to its positions. A query in chunk c looks at its own and the
previous chunk and at the sinks token by token (the reference does one such tile), and at chunks <= c - 2 through
their summed state. The chunk is a multiple of the window and no shorter than the convolution, so nothing near is
further away than the previous chunk.
"""

import torch
from torch import Tensor

from ..config import LinearAttentionConfig
from ..tokens import Tokens
from .reference import State, Weights, attend, contract

MIN_CHUNK = 64


def chunk_size(config: LinearAttentionConfig) -> int:
    window = config.window_size if config.window is not None else 1
    return window * -(-max(MIN_CHUNK, config.conv_taps) // window)


class Layout:
    """Slots [B, chunks * C] for tokens [B, T]: each document contiguous, from a chunk boundary, in position order.

    The first document of a row may continue from a cache: then its first positions here can be sinks, followed by a
    gap of tokens that only the state remembers. The gap gets no slots: what follows it starts the next chunk.
    """

    def __init__(self, tokens: Tokens, size: int, sinks: int):
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

    def pack(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, chunks, H, C, D]; empty slots hold some other token's values."""
        batch, heads, length, dim = x.shape
        rows = x.transpose(1, 2).reshape(batch * length, heads * dim).index_select(0, self.source)
        return rows.view(batch, self.chunks, -1, heads, dim).transpose(2, 3)

    def unpack(self, x: Tensor) -> Tensor:
        """[B, chunks, H, C, D] -> [B, H, T, D]."""
        batch, chunks, heads, size, dim = x.shape
        rows = x.transpose(2, 3).reshape(batch * chunks * size, heads * dim).index_select(0, self.target)
        return rows.view(batch, -1, heads, dim).transpose(1, 2)


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    tokens: Tokens,
    state: State | None,
    config: LinearAttentionConfig,
    weights: Weights,
    scale: float,
) -> Tensor:
    """Causal outputs [B, H, T, D_v] of whole sequences; arguments as `reference.attend`, one query per key.

    `state` belongs to document 0 of each row.
    """
    size = chunk_size(config)
    layout = Layout(tokens, size, config.sinks)
    batch, chunks = layout.position.shape[:2]
    device = q.device
    dtype = torch.promote_types(v.dtype, torch.float32)

    q, k, v = layout.pack(q), layout.pack(k), layout.pack(v)
    same_document = torch.zeros_like(layout.document, dtype=torch.bool)
    same_document[:, 1:] = layout.document[:, 1:] == layout.document[:, :-1]
    rows = torch.arange(batch, device=device)[:, None]

    def tile(x):  # (B, chunks, H, C, D) -> (B * chunks, H, sinks + 2 C, D)
        previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        sinks = x[..., : config.sinks, :][rows, layout.first_chunk]
        return torch.cat([sinks, previous, x], dim=3).flatten(0, 1)

    def tile_tokens(x):  # the same for (B, chunks, C)
        return tile(x[:, :, None, :, None]).flatten(1)

    order = torch.arange(size, device=device)
    causal = order[None, :] <= order[:, None]
    key_valid = tile_tokens(layout.valid)
    visible = torch.cat(
        [
            # Sinks in the own or previous chunk are there already.
            (layout.index_in_document >= 2)[..., None, None].expand(-1, -1, size, config.sinks),
            same_document[..., None, None].expand(-1, -1, size, size),
            causal.expand(batch, chunks, size, size),
        ],
        dim=-1,
    ).flatten(0, 1)
    visible = visible & key_valid[:, None, :]

    carried = None
    if phi_q is not None:
        phi_q, phi_k = layout.pack(phi_q), layout.pack(phi_k)
        enters_state = (layout.valid & (layout.position >= config.sinks))[:, :, None, :, None]
        summed_k = phi_k.to(dtype) * enters_state
        start = state or State(None, None)
        # Document 0 begins with what the cache holds, every other one with nothing.
        keep = same_document | ((layout.document == 0) & (layout.index_in_document == 0))
        carried = State(
            _sum_before_previous(summed_k.mT @ v.to(dtype), start.S, keep).flatten(0, 1),
            _sum_before_previous(summed_k.sum(-2), start.z, keep).flatten(0, 1),
        )
        phi_q, phi_k = phi_q.flatten(0, 1), tile(phi_k)

    v_tile = tile(v)
    out = attend(
        q.flatten(0, 1),
        tile(k),
        v_tile,
        phi_q,
        phi_k,
        layout.position.flatten(0, 1),
        tile_tokens(layout.position),
        visible,
        carried,
        config,
        weights,
        scale,
    )
    if weights.conv is not None:
        # The last query sees every key of its tile that the convolution can reach.
        reached = v_tile[:, :, config.sinks :].to(dtype) * visible[:, -1:, config.sinks :, None]
        out = out + _convolve(reached, weights.conv.to(dtype))
    return layout.unpack(out.unflatten(0, (batch, chunks)))


def _convolve(v: Tensor, weight: Tensor) -> Tensor:
    """[N, H, C, D]: the convolution of the later half of v [N, H_kv, 2 C, D], 0 where there is nothing, by `weight`
    [H, taps]. In a tile the distance of two tokens is that of their slots, so one matrix serves all tiles."""
    tiles, kv_heads, length, dim = v.shape
    size, taps = length // 2, weight.shape[1]
    # Row i of the matrix is the filter, last tap first, shifted by i. Indexing would do too, but its gradient sums
    # thousands of equal indices one after the other.
    shifted = torch.nn.functional.pad(weight.flip(-1), (length - taps, size - 1)).unfold(-1, length, 1)
    band = shifted.flip(1)  # (H, C, 2 C)
    columns = v.permute(1, 2, 0, 3).reshape(kv_heads, length, tiles * dim)
    out = contract(band[None], columns[None])[0]
    return out.view(len(weight), size, tiles, dim).permute(2, 0, 1, 3)


def _sum_before_previous(x: Tensor, start: Tensor | None, keep: Tensor) -> Tensor:
    """[B, chunks, ..]: for each chunk the sum of x over its document's chunks up to two before it, plus `start`.

    Args:
        x: [B, chunks, ..]; start: [B, ..], what document 0 begins with, or None; keep: [B, chunks], False where a new
            document begins (nothing is carried into it).
    """
    shape = (-1,) + (1,) * (x.dim() - 2)
    previous = torch.zeros_like(x[:, 0])
    total, sums = previous if start is None else start, []
    for chunk in range(x.shape[1]):
        kept = keep[:, chunk].view(shape)
        total, previous = total * kept, previous * kept
        sums.append(total)
        total, previous = total + previous, x[:, chunk]
    return torch.stack(sums, dim=1)
