"""What launches of the fused layers have in common: sizes, layout of documents, tensors as kernels take them."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...config import LinearAttentionConfig
from ...tokens import Tokens
from ..chunked import Layout, chunk_size

# Programs that a launch is cut into, about: where states are carried from chunk to chunk, and where chunks are on their
# own. Measured on an H100, which has 132 multiprocessors.
PROGRAMS = 128
INDEPENDENT_PROGRAMS = 2048
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass
class Shape:
    """T counts keys; queries are the last T - past.

    Attributes:
        chunks: of each row.
        source: [B, chunks, C] the token in each slot or -1, and [B, chunks] the chunk that its document begins with,
            carries and follows of `Layout`; None where rows are one document each, from its start.
    """

    config: LinearAttentionConfig
    device: torch.device
    batch: int
    heads: int
    kv_heads: int
    dim: int
    features: int
    tokens: int
    past: int
    scale: float
    chunks: int
    source: Tensor | None = None
    first: Tensor | None = None
    carries: Tensor | None = None
    follows: Tensor | None = None

    @classmethod
    def of(cls, problem) -> "Shape":
        batch, heads, queries, dim = problem.q.shape
        kv_heads, tokens = problem.k.shape[1:3]
        return cls(
            problem.config, problem.q.device, batch, heads, kv_heads, dim, problem.k_features.map.dim, tokens,
            tokens - queries, problem.scale, *cls.layout_of(problem.keys, problem.config),
        )  # fmt: skip

    @staticmethod
    def layout_of(keys: Tokens, config: LinearAttentionConfig) -> tuple:
        """The fields from `chunks` on."""
        size = chunk_size(config)
        if keys.whole:
            return (triton.cdiv(keys.document.shape[1], size),)
        layout = Layout.of(keys, size, config.sinks)
        return layout.chunks, *layout.gathered

    def segments(self, rows: int, programs: int) -> tuple[int, int]:
        """How many segments `rows` sequences of chunks are cut into, and the chunks of each."""
        span = triton.cdiv(self.chunks, max(1, min(self.chunks, round(programs / rows))))
        return triton.cdiv(self.chunks, span), span

    def given(self, width: int, *tensors: Tensor) -> list:
        """Tensors [B, H, T, ..] as kernels take them: for chunks of rows of `width` columns, or of any rows."""
        if self.source is not None:
            return list(tensors)
        block = [1, 1, chunk_size(self.config), width]
        return [TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in tensors]


def refused(problem) -> str | None:
    """Why no fused layer takes `problem`, or None."""
    if problem.q_features is None:
        return "there is no far branch"
    if not problem.causal:
        return "queries see what is behind them"
    if problem.bias is not None:
        return "scores have a bias"
    if problem.config.local != "softmax":
        return f"near keys are weighted by {problem.config.local}"
    if problem.ancestors is not None or problem.q.shape[2] < 2:
        return "draft trees and single tokens are small"
    if problem.v.dtype not in DTYPES:
        return f"they do not compute in {problem.v.dtype}"
    return None


def fits_learned(size: int) -> bool:
    """Whether heads of this size leave room in shared memory for a learned map: between 64 and 128 they are padded, and
    their values cannot be done in halves."""
    return size <= 64 or size == 128


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of batch, head and token."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def rows_last(x: Tensor) -> Tensor:
    """x with rows as the copy engine takes them: dense, from addresses that 16 bytes divide."""
    size = x.element_size()
    fits = x.stride(-1) == 1 and not any(stride * size % 16 for stride in x.stride()[:3]) and not x.data_ptr() % 16
    return x if fits else x.contiguous()


def room(shape: Shape):
    """What makes a tensor that programs fill, except for padding: there it must be zero."""
    return torch.empty if shape.source is None else torch.zeros


def results(shape: Shape, *like: Tensor) -> list[Tensor]:
    """[B, H, T, D] in the memory order of transformers, [B, T, H, D]."""
    return [
        room(shape)(x.transpose(1, 2).shape, dtype=x.dtype, device=x.device).transpose(1, 2) for x in like
    ]
