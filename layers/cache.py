"""What generation remembers: per layer one state, the sinks, and one ring of recent raw keys and values.

Bytes do not depend on how many tokens were seen, except where heads are kept softmax (`softmax.SoftmaxMemory`).
Only a token that has left every window, and the `slack` behind it, enters the state; so the state is read-only for
draft trees, and `crop` moves a cursor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .config import LinearAttentionConfig
from .kernels import Features, Gates, State, fold, triton_kernels
from .softmax import SoftmaxMemory
from .tokens import PADDING, Tokens


@dataclass
class Draft:
    """A tree that was verified.

    Attributes:
        keys: k, v and `raw` [B, H_kv, T, ..] of its nodes, by name.
        describe: gives features and gates of any such keys, or None without far branch.
        far: of its nodes, what the cache's `far` is to have of them; None where fused kernels have not verified it.
    """

    keys: dict[str, Tensor]
    describe: Callable[[dict[str, Tensor]], Features | None]
    far: dict[str, Tensor] | None = None


class LinearCacheLayer(CacheLayerMixin):
    """The memory of one layer. B rows, R ring slots, s sinks.

    Attributes:
        ring: name -> [B, H_kv, R, ..] of `k` (after the rotary embedding), `raw` (before it, where it differs) and
            `v`; position p of a row is in slot p modulo R, its latest `count` positions are held. R is
            `config.ring_size`, while fused steps go on some more.
        sinks: the same names, [B, H_kv, s, ..]: the first s positions, which `recall` takes once they left the ring.
        state: sums over all other tokens that have left the ring, or None without far branch.
        far: what fused steps know of the ring's tokens (`kernels.fused.step.remember`), or None where something else
            has changed the cache since then.
        ancestors: [T, T] of a draft tree while its nodes go through the model (`LinearCache.verifying`).
        memory: the kept heads' tokens, which alone grow (up to `config.kept_tokens`).
        length, count, segment: [B], tokens of the current document, those in the ring, the document's segment.
        seen: columns of input so far, padding included; what transformers calls the sequence length.
    """

    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, config: LinearAttentionConfig):
        super().__init__()
        self.config = config
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.ring: dict[str, Tensor] = {}
        self.sinks: dict[str, Tensor] = {}
        self.state: State | None = None
        self.far: dict[str, Tensor] | None = None
        self.ancestors: Tensor | None = None
        self.draft: Draft | None = None
        self.memory = SoftmaxMemory(self.config.sinks, self.config.kept_tokens)
        self.seen = 0

    def lazy_initialization(self, new: dict[str, Tensor], phi_k: Tensor | None) -> None:
        first = new["v"]
        batch, heads, _, value_dim = first.shape

        def empty(slots):
            return {name: x.new_zeros(batch, heads, slots, x.shape[-1]) for name, x in new.items()}

        self.ring, self.sinks = empty(self.config.ring_size), empty(self.config.sinks)
        if phi_k is not None:
            # bf16 sums stop growing after some 2^8 increments.
            dtype = torch.promote_types(first.dtype, torch.float32)
            features = phi_k.shape[-1]
            self.state = State(
                first.new_zeros(batch, heads, features, value_dim, dtype=dtype),
                first.new_zeros(batch, heads, features, dtype=dtype),
            )
        self.length, self.count, self.segment = (
            torch.zeros(batch, dtype=torch.long, device=first.device) for _ in range(3)
        )
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Hands new keys and values through: the attention function called next does the work, with queries."""
        return key_states, value_states

    def recall(self, new: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tokens]:
        """Sinks and ring followed by `new`, and document and position of the remembered part: nothing before the first
        token, so that a prompt is a whole sequence to the kernels."""
        if self.seen == 0:
            return new, Tokens(self.length.new_zeros(len(self.length), 0), self.length.new_zeros(len(self.length), 0))
        slots = self.ring["v"].shape[2]
        index = torch.arange(slots, device=self.length.device)
        start = (self.length - self.count)[:, None]
        position = start + index
        sink = torch.arange(self.config.sinks, device=self.length.device).expand(len(self.length), -1)
        held = torch.cat([sink < start, index < self.count[:, None]], dim=1)
        tokens = Tokens(torch.where(held, 0, PADDING), torch.cat([sink, position], dim=1))
        slot = position % max(slots, 1)
        return {
            name: torch.cat([self.sinks[name], _pick(self.ring[name], slot), x], dim=2) for name, x in new.items()
        }, tokens

    def append(
        self,
        keys: dict[str, Tensor],
        phi_k: Tensor | None,
        gates: Gates | None,
        tokens: Tokens,
        new: int,
        segments: Tensor | None,
    ) -> None:
        """Take in the last `new` tokens among `keys` (what `recall` returned); what leaves the ring enters the state.

        Args:
            phi_k: [B, H_kv, K, F], gates and tokens: of all keys; segments: [B, T] of the new ones.
        """
        sinks, ring_size = self.config.sinks, self.config.ring_size
        document, position = tokens.document, tokens.position
        remembered = document.shape[1] - new
        current = document[:, remembered:].amax(1, keepdim=True).clamp(min=0)
        continues = (current == 0).squeeze(1)
        added = (document[:, remembered:] == current).sum(1)
        self.length = self.length * continues + added
        self.count = (self.count * continues + added).clamp(max=self.config.ring_size)
        start = (self.length - self.count)[:, None]

        belongs = document == current
        leaves = belongs & (position < start)
        is_sink = position < sinks
        if phi_k is not None:
            # The oldest leave, as many as are new at most and those that fused steps have left in more slots; they are
            # in the ring unless the new ones overrun it.
            leaving = new + self.ring["v"].shape[2] - ring_size
            part = slice(sinks, sinks + leaving) if remembered and new <= ring_size else slice(None)
            keep = continues[:, None, None]
            self.state = State(self.state.S * keep[..., None], self.state.z * keep)
            self._fold(keys, phi_k, gates, tokens, leaves[:, part], part)
        self.ring = _place(keys, belongs & ~leaves, position % max(ring_size, 1), ring_size)
        self.sinks = _place(keys, belongs & is_sink, position, sinks)
        if segments is None:
            self.segment = torch.ones_like(self.segment)
        else:
            index = torch.arange(segments.shape[1], device=segments.device)
            last = torch.where(segments > 0, index, -1).amax(1)
            latest = segments.gather(1, last.clamp(min=0)[:, None]).squeeze(1)
            self.segment = torch.where(last >= 0, latest, self.segment)
        self.far = None
        self.seen += new

    def step(self, keys: dict[str, Tensor], phi_k: Tensor | None, gates: Gates | None, tokens: Tokens) -> None:
        """`append` of one new token in every row, not after fused steps: nothing is moved but that token and the one
        that leaves the ring."""
        sinks, ring_size = self.config.sinks, self.config.ring_size
        if phi_k is not None:
            oldest = slice(sinks, sinks + 1)
            self._fold(keys, phi_k, gates, tokens, (self.count == ring_size)[:, None], oldest)
        is_sink = torch.arange(sinks, device=self.length.device) == self.length[:, None]
        slot = (self.length % ring_size)[:, None]
        for name, x in keys.items():
            self.ring[name] = _write(self.ring[name], slot, x[:, :, -1:])
            if sinks:
                self.sinks[name] = torch.where(is_sink[:, None, :, None], x[:, :, -1:], self.sinks[name])
        self.length, self.count = self.length + 1, (self.count + 1).clamp(max=ring_size)
        self.segment = torch.ones_like(self.segment)
        self.seen += 1

    def advance(self, added: Tensor | int, columns: int) -> None:
        """`added` [B] tokens in so many columns came, of which only `memory` holds anything; in place, for graphs."""
        self.length += added
        self.count.add_(added).clamp_(max=self.config.ring_size)
        self.segment.fill_(1)
        self.seen += columns

    def _fold(self, keys, phi_k, gates, tokens, leaves: Tensor, part: slice) -> None:
        """Those of `part` of the keys that leave [B, part] enter the state."""
        self.state = fold(
            phi_k[:, :, part],
            keys["v"][:, :, part],
            None if gates is None else gates.map(lambda x: x[:, :, part]),
            self.state,
            Tokens(torch.where(leaves, 0, PADDING), tokens.position[:, part]),
            self.config,
        )

    def accept(self, path: Tensor) -> None:
        """Commit nodes of the tree that the last forward verified.

        Args:
            path: [B, n] node indices from the root on; -1 fills rows that accept fewer.
        """
        draft, self.draft = self.draft, None
        self.memory.accept(path, self.length)
        if self.memory.reserved and not self.ring["v"].shape[1]:
            self.advance((path >= 0).sum(1), path.shape[1])
            return
        if draft.far is not None and self.far is not None and triton_kernels.step.accepts(self, path.shape[1]):
            triton_kernels.step.accept(self, draft.keys, draft.far, path)
            return
        keys, past = self.recall({name: _pick(x, path.clamp(min=0)) for name, x in draft.keys.items()})
        depth = torch.arange(path.shape[1], device=path.device)
        tokens = Tokens(
            torch.cat([past.document, torch.where(path >= 0, 0, PADDING)], dim=1),
            torch.cat([past.position, self.length[:, None] + depth], dim=1),
        )
        features = draft.describe(keys)
        phi_k, gates = (None, None) if features is None else (features.phi, features.gates)
        self.append(keys, phi_k, gates, tokens, path.shape[1], None)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row, exactly.

        Raises:
            ValueError: when tokens that a window would need again are already folded into the state.
        """
        remove = -tokens_to_remove
        if remove < 0:
            raise ValueError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove")
        if remove == 0 or not self.is_initialized:
            return
        length, count = self.length - remove, self.count - remove
        needed = torch.where(self.length > self.count, length.clamp(max=self.config.reach), 0)
        if (count < needed).any() or (length < 0).any():
            raise ValueError(
                f"crop({tokens_to_remove}): only {self.config.slack} tokens can be taken back once the ring is full; "
                "configure the layer with a larger slack"
            )
        self.length, self.count = length, count
        self.memory.crop(length)
        self.seen -= remove

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.ring = {name: function(x) for name, x in self.ring.items()}
        self.sinks = {name: function(x) for name, x in self.sinks.items()}
        if self.state is not None:
            self.state = State(function(self.state.S), function(self.state.z))
        if self.far is not None:
            self.far = {name: function(x) for name, x in self.far.items()}
        self.memory.map_rows(function)
        self.length, self.count, self.segment = function(self.length), function(self.count), function(self.segment)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def _past(self) -> list[Tensor]:
        state = [] if self.state is None else [self.state.S, self.state.z]
        return [*self.ring.values(), *self.sinks.values(), *(self.far or {}).values(), *state]

    def tensors(self) -> list[Tensor]:
        """Rows first."""
        return [*self._past(), *self.memory.tensors(), self.length, self.count, self.segment]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._past()) + self.memory.nbytes


class LinearCache(Cache):
    """The cache of a linearized model: a `LinearCacheLayer` where attention is linear, and whatever transformers
    uses for the model's other layers (short convolutions and the like).
    """

    def __init__(self, model):
        config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        for layer_idx, attention in model.linear_attentions().items():
            while len(layers) <= layer_idx:
                layers.append(None)
            layers[layer_idx] = LinearCacheLayer(attention.config)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes held by the linear layers."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LinearCacheLayer))

    @property
    def length(self) -> Tensor:
        """[B], tokens of each row's current document."""
        return next(layer for layer in self.layers if isinstance(layer, LinearCacheLayer)).length

    def start_like(self, other: "LinearCache") -> None:
        """Begin anew, ready for steps, with memory of the sizes that another cache has; all its layers are linear."""
        self.layers = deepcopy(other.layers)
        torch._foreach_zero_([x for layer in self.layers for x in layer.tensors()])
        for layer in self.layers:
            layer.memory.crop(layer.length)
            layer.seen = 0

    @contextmanager
    def verifying(self, ancestors: Tensor) -> Iterator[None]:
        """Meanwhile the tokens that a model is given are nodes of a draft tree; `accept` adds a path of them."""
        layers = [layer for layer in self.layers if isinstance(layer, LinearCacheLayer)]
        try:
            for layer in layers:
                layer.ancestors = ancestors
            yield
        finally:
            for layer in layers:
                layer.ancestors = None

    def accept(self, path: Tensor) -> None:
        """`LinearCacheLayer.accept` on every linear layer."""
        for layer in self.layers:
            if isinstance(layer, LinearCacheLayer):
                layer.accept(path)


def _place(keys: dict[str, Tensor], chosen: Tensor, slot: Tensor, slots: int) -> dict[str, Tensor]:
    """[B, H_kv, slots, ..] with the `chosen` [B, K] tokens at their `slot`; other slots hold anything."""
    batch, length = chosen.shape
    source = torch.zeros(batch, slots + 1, dtype=torch.long, device=chosen.device)
    index = torch.arange(length, device=chosen.device).expand(batch, -1)
    source = source.scatter(1, torch.where(chosen, slot, slots), index)[:, :slots]
    return {name: _pick(x, source) for name, x in keys.items()}


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """[B, H_kv, n, ..] the tokens `index` [B, n] of x [B, H_kv, K, ..]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _write(x: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """x [B, H_kv, R, ..] with `new` [B, H_kv, 1, ..] at `slot` [B, 1]; in place where autograd does not mind."""
    index = slot[:, None, :, None].expand_as(new)
    if torch.is_grad_enabled() or (x.is_inference() and not torch.is_inference_mode_enabled()):
        return x.scatter(2, index, new)
    return x.scatter_(2, index, new)
