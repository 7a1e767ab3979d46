"""What generation remembers: per layer one state, the sinks, and one ring of recent raw keys and values.

Bytes do not depend on how many tokens were seen, except where heads are kept softmax (`softmax.SoftmaxMemory`).
Only a token that has left every window, and the `slack` behind it, enters the state; so the state is read-only for
draft trees, and `crop` moves a cursor.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .config import LinearAttentionConfig
from .kernels import Features, State, fold, triton_kernels
from .passage import Passage
from .softmax import SoftmaxMemory
from .tokens import PADDING, Tokens, nothing


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


@dataclass
class Shared:
    """What the layers of a cache have in common.

    Attributes:
        passage: the latest, for the next layer of the same forward pass.
        segments: [B, T] of the tokens that come next, in place of those that a mask gives; None: what the mask says.
        detached: whether linear heads' tokens enter without their gradient.
    """

    passage: Passage | None = None
    segments: Tensor | None = None
    detached: bool = False


class RowsLayer(CacheLayerMixin):
    """A layer whose tensors have a row for each sequence, and all that `generate` does to rows; what holds the tensors
    says how a function is applied to all of them."""

    is_croppable = True
    supports_early_init = False
    is_sliding = False

    @abstractmethod
    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put what `function` makes of it in the place of every tensor."""

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))


class LinearCacheLayer(RowsLayer):
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
        length, count, segment: [B], tokens of the current document, those in the ring, the document's segment. Layers
            may have the same tensors, while fused steps write into their own.
        seen: columns of input so far, padding included; what transformers calls the sequence length.

    Raises:
        ValueError: where far keys are weighed by something that no state can stand for.
    """

    def __init__(self, config: LinearAttentionConfig, shared: Shared | None = None):
        if config.far != "features":
            raise ValueError(
                f"far: {config.far} weighs each key by itself, so no cache of constant size stands for them: pass "
                "use_cache=False, or convert with another preset"
            )
        super().__init__()
        self.config, self.shared = config, shared or Shared()
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

    def lazy_initialization(self, value_states: Tensor, heads: int, features: int) -> None:
        """For values like these [B, .., D_v], a state of so many heads and features; none without features."""
        batch, device, value_dim = len(value_states), value_states.device, value_states.shape[-1]
        if features:
            # bf16 sums stop growing after some 2^8 increments.
            dtype = torch.promote_types(value_states.dtype, torch.float32)
            self.state = State(
                value_states.new_zeros(batch, heads, features, value_dim, dtype=dtype),
                value_states.new_zeros(batch, heads, features, dtype=dtype),
            )
        self.length = self.count = self.segment = nothing(batch, device, torch.is_inference_mode_enabled())
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Hands new keys and values through: the attention function called next does the work, with queries."""
        return key_states, value_states

    def passage(
        self, new: int, segments: Tensor | None = None, ancestors: Tensor | None = None, path: Tensor | None = None
    ) -> Passage:
        """Of `new` tokens, the same object for all layers of a forward pass; `segments` and `ancestors` are those of
        the layer, `path` that of `accept`."""
        slots, clock = self.ring["v"].shape[2] if self.ring else 0, (self.length, self.count, self.segment)
        given = (segments, ancestors, path), (self.config, self.seen, slots, new)
        if self.shared.passage is None or not self.shared.passage.is_of(clock, *given):
            self.shared.passage = Passage(clock, *given)
        return self.shared.passage

    def recall(self, new: dict[str, Tensor], passage: Passage) -> dict[str, Tensor]:
        """Sinks and ring followed by `new`: nothing before the first token, so that a prompt is a whole sequence to the
        kernels."""
        if passage.order is None:
            return new
        return {
            name: torch.cat([self.sinks[name], _pick(self.ring[name], passage.order), x], dim=2)
            for name, x in new.items()
        }

    def append(self, keys: dict[str, Tensor], features: Features | None, passage: Passage) -> None:
        """Take in the new tokens among `keys` (what `recall` returned); what leaves the ring enters the state.

        Args:
            features: of all keys, or None without far branch.
        """
        if features is not None:
            part, leaving = passage.leaving
            if passage.continues is not None:
                keep = passage.continues[:, None, None]
                self.state = State(self.state.S * keep[..., None], self.state.z * keep)
            if leaving is not None:
                self.state = fold(features.part(part), keys["v"][:, :, part], self.state, leaving, self.config)
        ring, sinks = passage.places
        self.ring = {name: _pick(x, ring) for name, x in keys.items()}
        self.sinks = {name: _pick(x, sinks) for name, x in keys.items()}
        self.length, self.count, self.segment = passage.after
        self.far = None
        self.seen += passage.new.document.shape[1]

    def step(self, keys: dict[str, Tensor], features: Features | None, passage: Passage) -> None:
        """`append` of one new token in every row, not after fused steps: nothing is moved but that token and the one
        that leaves the ring."""
        sinks, ring_size = self.config.sinks, self.config.ring_size
        if features is not None:
            oldest = slice(sinks, sinks + 1)
            leaving = torch.where(self.count == ring_size, 0, PADDING)[:, None]
            leaving = Tokens(leaving, passage.tokens.position[:, oldest])
            self.state = fold(features.part(oldest), keys["v"][:, :, oldest], self.state, leaving, self.config)
        is_sink = torch.arange(sinks, device=self.length.device) == self.length[:, None]
        slot = (self.length % ring_size)[:, None]
        for name, x in keys.items():
            self.ring[name] = _write(self.ring[name], slot, x[:, :, -1:])
            if sinks:
                self.sinks[name] = torch.where(is_sink[:, None, :, None], x[:, :, -1:], self.sinks[name])
        self.length, self.count, self.segment = passage.after
        self.seen += 1

    def advance(self, added: Tensor | int, columns: int) -> None:
        """`added` [B] tokens in so many columns came, of which only `memory` holds anything; in place, for graphs."""
        self.length += added
        self.count.add_(added).clamp_(max=self.config.ring_size)
        self.segment.fill_(1)
        self.seen += columns

    def accept(self, path: Tensor, clock: Tensor | None = None) -> None:
        """Commit nodes of the tree that the last forward verified.

        Args:
            path: [B, n] node indices from the root on; -1 fills rows that accept fewer.
            clock: [2, B], a copy of `length` and `count`, if there is one.
        """
        draft, self.draft = self.draft, None
        self.memory.accept(path, self.length)
        if self.memory.reserved and not self.ring["v"].shape[1]:
            self.advance((path >= 0).sum(1), path.shape[1])
            return
        if draft.far is not None and self.far is not None and triton_kernels.step.accepts(self, path.shape[1]):
            clock = torch.stack([self.length, self.count]) if clock is None else clock
            triton_kernels.step.accept(self, draft.keys, draft.far, path, clock)
            return
        passage = self.passage(path.shape[1], path=path)
        keys = self.recall({name: _pick(x, path.clamp(min=0)) for name, x in draft.keys.items()}, passage)
        self.append(keys, draft.describe(keys), passage)

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

    def latest(self, name: str) -> Tensor:
        """[B, H_kv, 1, ..] of the latest token, anything in rows that have none."""
        slots = self.ring[name].shape[2]
        return _pick(self.ring[name], ((self.length - 1) % slots)[:, None])

    def get_seq_length(self) -> int:
        return self.seen

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

    def _past(self) -> list[Tensor]:
        state = [] if self.state is None else [self.state.S, self.state.z]
        return [*self.ring.values(), *self.sinks.values(), *(self.far or {}).values(), *state]

    def branch(self, shared: Shared, function: Callable[[Tensor], Tensor]) -> "LinearCacheLayer":
        """`LinearCache.branch` of one layer."""
        layer = copy(self)
        layer.shared, layer.memory = shared, copy(self.memory)
        # Layers have their counts in common, and know them by identity.
        layer._map_rows(lambda x: function(x) if x.is_floating_point() else x)
        return layer

    def contents(self) -> list[Tensor]:
        """What gradients pass through on their way from token to token; none before the first one."""
        return [x for x in (*self._past(), *self.memory.tensors()) if x.is_floating_point()]

    def shape_like(self, other: "LinearCacheLayer") -> None:
        """Hold tensors, whatever is in them, of the sizes that a layer has which has begun."""
        self.ring, self.sinks, self.state, self.far = other.ring, other.sinks, other.state, other.far
        self.length, self.count, self.segment = other.length, other.count, other.segment
        self.memory, self.is_initialized = copy(other.memory), True
        self._map_rows(torch.empty_like)

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
        if model.is_encoder:
            raise ValueError(f"{type(model).__name__} looks both ways: it reads whole sequences, and has no cache")
        config, shared = model.config.get_text_config(decoder=True), Shared()
        # An encoder's layers have none, a decoder's behind it nothing but linear ones.
        layers = [] if model.config.is_encoder_decoder else DynamicCache(config=config).layers
        for module in model.linear_modules():
            if not module.linear_attention.causal:
                continue
            while len(layers) <= module.layer_idx:
                layers.append(None)
            layers[module.layer_idx] = LinearCacheLayer(module.linear_attention.config, shared)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes held by the linear layers."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, LinearCacheLayer))

    @property
    def length(self) -> Tensor:
        """[B], tokens of each row's current document."""
        return next(layer for layer in self.layers if isinstance(layer, LinearCacheLayer)).length

    @property
    def begun(self) -> bool:
        """Whether there are tensors."""
        return all(layer.is_initialized for layer in self.layers)

    def tensors(self) -> list[Tensor]:
        """Of all layers, rows first; all are linear."""
        return [x for layer in self.layers for x in layer.tensors()]

    def take(self, other: "LinearCache") -> None:
        """Hold, in tensors of its own, what another cache of the same model holds; `seen` stays what it is."""
        for layer, like in zip(self.layers, other.layers, strict=True):
            layer.shape_like(like)
        copy_all(self.tensors(), other.tensors())

    def clear(self) -> None:
        """Hold no token, in the tensors that there are."""
        for (some,) in _alike(self.tensors()):
            torch._foreach_zero_(some)
        for layer in self.layers:
            if layer.memory.position is not None:
                layer.memory.position.fill_(PADDING)

    def branch(
        self, function: Callable[[Tensor], Tensor], segments: Tensor | None = None, detached: bool = False
    ) -> "LinearCache":
        """A cache that goes on from here by itself, by two tokens or more at a time (steps write in place); all layers
        are linear.

        Args:
            function: gives what the branch has of each of `contents`; `Tensor.detach` the same, without its gradient.
            segments: [B, T] of the branch's first tokens (see `tokens`), where these are of several documents.
                transformers finds packed documents only where there is no cache.
            detached: whether its tokens enter without their gradient, which takes less.
        """
        branch, shared = copy(self), Shared(segments=segments, detached=detached)
        branch.layers = [layer.branch(shared, function) for layer in self.layers]
        return branch

    def contents(self) -> list[Tensor]:
        """`LinearCacheLayer.contents` of all layers, which are linear."""
        return [x for layer in self.layers for x in layer.contents()]

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
        layers = [layer for layer in self.layers if isinstance(layer, LinearCacheLayer)]
        # One for all that fused steps know, which hold as many tokens.
        clock = next((torch.stack([layer.length, layer.count]) for layer in layers if layer.far is not None), None)
        for layer in layers:
            layer.accept(path, clock)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Each source into its target."""
    for some, others in _alike(targets, sources):
        torch._foreach_copy_(some, others)


def _alike(*lists: list[Tensor]) -> list[tuple[tuple[Tensor, ...], ...]]:
    """Parts of lists of tensors that are each of one dtype, as takes fewer launches than there are tensors."""
    parts = defaultdict(list)
    for row in zip(*lists, strict=True):
        parts[tuple(x.dtype for x in row)].append(row)
    return [tuple(zip(*rows, strict=True)) for rows in parts.values()]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """[B, H_kv, n, ..] the tokens `index` [B, n] of x [B, H_kv, K, ..]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _write(x: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """x [B, H_kv, R, ..] with `new` [B, H_kv, 1, ..] at `slot` [B, 1]; in place where autograd does not mind."""
    index = slot[:, None, :, None].expand_as(new)
    if torch.is_grad_enabled() or (x.is_inference() and not torch.is_inference_mode_enabled()):
        return x.scatter(2, index, new)
    return x.scatter_(2, index, new)
