"""Long sequences in segments: what has rows per token, or is a state per chunk, exists for one segment at a time.

A segment is some chunks of every row. The last chunk before it is done again with it, as queries see keys of the
previous chunk and the state before that; so the state that a segment starts from is the one before that chunk. Forward
keeps it for backward, which takes segments from the last to the first and makes everything else again.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import SLOTS, rows_of
from .shape import Shape

# Chunks, counted in all heads of all rows: sequences of no more are one segment, of which forward leaves everything to
# backward; else a segment has about so many (every segment is as many launches, whatever it has), and of each row at
# least so many, as one of them is done twice.
WHOLE = 4096
AT_ONCE = 1024
LEAST = 8
ROWS = 32


@dataclass(frozen=True)
class Segment:
    """Chunks start..end of each row; buffers hold them and the one before, `begin`."""

    start: int
    end: int

    @property
    def begin(self) -> int:
        return max(self.start - 1, 0)

    @property
    def chunks(self) -> int:
        return self.end - self.start

    @property
    def span(self) -> int:
        """Chunks of a row in buffers."""
        return self.end - self.begin


def segments_of(shape: Shape) -> list[Segment]:
    rows, n = shape.batch * shape.heads, shape.chunks
    if rows * n <= WHOLE:
        return [Segment(0, n)]
    count = triton.cdiv(n, max(LEAST, AT_ONCE // rows))
    span = triton.cdiv(n, count)
    return [Segment(start, min(start + span, n)) for start in range(0, n, span)]


@triton.jit(do_not_specialize=SLOTS)
def _move(
    x, buffer, source, x_b, x_h, x_t, H, T, past, first, held_slots, skip, slots,
    F: tl.constexpr, BF: tl.constexpr, ROWS: tl.constexpr, INDEXED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """buffer [B * H, held_slots, BF] (from `skip` on) of x [B, H, T, F], zero where none is; BACK: x of buffer."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    place, token, held = rows_of(source, batch, first, slots, past, T, ROWS, INDEXED)
    place += skip
    inside = (place < held_slots)[:, None]
    column = tl.arange(0, BF)[None, :]
    at = x + batch * x_b + head * x_h + token[:, None].to(tl.int64) * x_t + column
    at_buffer = buffer + (row * held_slots + place)[:, None] * BF + column
    mask = inside & held[:, None] & (column < F)
    if BACK:
        tl.store(at, tl.load(at_buffer, mask=mask), mask=mask)
    else:
        tl.store(at_buffer, tl.load(at, mask=mask, other=0.0), mask=inside)


class Given:
    """Features [B, H, T, F] that are there already, with the methods of `features.Hedgehog`."""

    def __init__(
        self, phi: Tensor, gates: list[Tensor | None], past: int, source: Tensor | None, columns: int
    ):
        self.phi = phi if phi.stride(-1) == 1 else phi.contiguous()
        self.past, self.source, self.columns = past, source, columns
        self.log_decay, self.beta = (None if x is None else x.detach().float().contiguous() for x in gates)

    def _move(self, x: Tensor, buffer: Tensor, first: int, count: int, skip: int, back: bool) -> None:
        batch, heads, tokens, features = x.shape
        slots = 0 if self.source is None else self.source[0].numel()
        held = buffer.numel() // (self.columns * batch * heads)
        _move[(batch * heads, triton.cdiv(count, ROWS))](
            x, buffer, self.source, *x.stride()[:3], heads, tokens, self.past, first, held, skip, slots,
            F=features, BF=self.columns, ROWS=ROWS, INDEXED=self.source is not None, BACK=back, num_warps=4,
        )  # fmt: skip

    def of(self, first: int, count: int) -> Tensor:
        buffer = self.phi.new_empty(self.phi.shape[0] * self.phi.shape[1] * count, self.columns)
        self._move(self.phi, buffer, first, count, 0, back=False)
        return buffer

    def start_back(self) -> None:
        make = torch.empty if self.source is None else torch.zeros
        self.dphi = make(self.phi.shape, dtype=self.phi.dtype, device=self.phi.device)

    def back(
        self, first: int, count: int, dphi: Tensor, dlog_decay: Tensor | None, dbeta: Tensor | None, skip: int = 0
    ) -> None:
        self._move(self.dphi, dphi, first, count, skip, back=True)
        self.gates = dlog_decay, dbeta

    def gradients(self) -> tuple[Tensor | None, ...]:
        given = zip((self.log_decay, self.beta), self.gates, strict=True)
        return self.dphi, *(None if x is None else dx for x, dx in given)
