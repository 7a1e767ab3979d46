"""What one augmented linear attention layer is: its configuration and the named presets."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

FeatureMapName = Literal[
    "identity", "l2", "linear", "relu", "elu1", "exp", "hedgehog", "t2r", "favor", "rfa", "cosine", "taylor", "dpfp"
]

# What a far weight grows by when its parameter grows by 1. Far keys may weigh several times the nearest one, and
# transfer has but some hundred steps of 1e-2 to find that out.
FAR_UNIT = 10.0


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """One layer, `o = local softmax over near keys + linear attention over far keys + convolution of values`.

    Attributes:
        window: how near keys are chosen: `sliding` (p_i - p_j < size), `block` (same group of `window_size`,
            Linearized-LLM), `terrace` (own and previous group, LoLCATs), or None: every key is far.
        window_size: tokens (w or G).
        sinks: the first tokens of each document stay near for ever.
        sink_distance: queries further on than this see the sinks as if from this position (StreamingLLM's positions
            within the cache), so no rotation is ever larger than trained ones; needs documents that start at
            position 0. None: from their true position.
        local: the weights of near keys: `softmax`; `relu2`, the squared relu of the cosine of q and k, not scaled
            (Linearized-LLM's code for LLaMA, GPT-2 and T5); or `laplace`, the Laplace function of the scaled scores
            (its code for FLASH; arXiv 2209.10655). Nothing divides the latter two by their sum, so they go with
            `combine: sum`.
        feature_map: phi of the far branch, or None for no such branch.
        far: by what far keys are weighed: `features`, phi(q).phi(k), of which a state of constant size remembers the
            sums; or, without a feature map and without a cache, `yoso`, (1 - arccos(cos(q, k)) / pi)^8 of each pair
            (YOSO, arXiv 2111.09714, eq. 3); or `linformer`, softmax over what is learned to be made of each block of
            `window_size` tokens, `feature_dim` rows of keys and values (Linformer, arXiv 2006.04768, eq. 7, by blocks,
            so that nothing leaks).
        key_maps: whether keys have a feature map for each `key_head`, or for each `query_head` (LoLCATs), which then
            has a state and recent keys of its own: with G query heads per key head, G times the memory.
        feature_dim: F, the length of phi(k), i.e. the rows of the state. None takes `feature_expansion` times the
            map's own default.
        state: the rule by which far keys enter the state: `additive`; `decay`, where what is there fades with every
            key; or `delta`, the gated delta rule, where a key also replaces what was stored under it.
        rope: whether phi sees q, k `before` or `after` the rotary embedding.
        combine: `shared` puts near and far under one denominator (LoLCATs); `sum` adds the far output, scaled by
            a learned alpha per head, to the softmax output (Linearized-LLM).
        norm: divides the far output where `combine` is `sum`: the `sum` of far weights, the `count` of far keys, its
            own `rms` or `l2` norm, or nothing.
        far_weight: where `combine` is `shared`: `one` learns the gate g on the near branch and leaves the far
            branch at weight 1 (LoLCATs); `learned` fixes g = 1 and learns a weight per head; `query` multiplies this
            by exp(w.q) with a learned w per head, on the q that phi sees.
        far_start: the weight of the far branch that is learned, at the start.
        conv_taps: K, taps of the depthwise convolution on v (one filter per query head, zero at start): of the token
            and K - 1 before it, and, where a layer looks both ways, K - 1 behind it.
        cross: whether a decoder's attention to an encoder's states stays `softmax`, or becomes `linear` in all of them
            by the same feature map; where a model has such attention.
        kept_window: where heads are kept softmax, how many tokens back they look, sinks beside them as above: their
            memory is constant too. None: all tokens.
        slack: recent tokens that the cache keeps beyond the window: the longest exact `crop` and the deepest tree.

    Raises:
        ValueError: naming the field, when the values contradict each other.
    """

    window: Literal["sliding", "block", "terrace"] | None = "sliding"
    window_size: int = 64
    sinks: int = 4
    sink_distance: int | None = None
    local: Literal["softmax", "relu2", "laplace"] = "softmax"
    feature_map: FeatureMapName | None = "hedgehog"
    far: Literal["features", "yoso", "linformer"] = "features"
    key_maps: Literal["key_head", "query_head"] = "key_head"
    feature_dim: int | None = None
    feature_expansion: int = 1
    state: Literal["additive", "decay", "delta"] = "additive"
    rope: Literal["before", "after"] = "before"
    combine: Literal["shared", "sum"] = "shared"
    norm: Literal["sum", "count", "rms", "l2", "none"] = "sum"
    far_weight: Literal["one", "learned", "query"] = "learned"
    far_start: float = 0.0
    conv_taps: int = 32
    cross: Literal["softmax", "linear"] = "softmax"
    kept_window: int | None = None
    slack: int = 64

    def __post_init__(self):
        if self.window is not None and self.window_size < 1:
            raise ValueError(f"window_size: {self.window_size} keeps no token near; use 1 or more, or window: null")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"feature_dim: {self.feature_dim} leaves phi empty; use 1 or more, or feature_map: null")
        if self.sink_distance is not None and self.sink_distance < 1:
            raise ValueError(f"sink_distance: {self.sink_distance} is no distance; use 1 or more, or null")
        if self.kept_window is not None and self.kept_window < max(1, self.sinks):
            least = max(1, self.sinks)
            raise ValueError(f"kept_window: {self.kept_window} tokens are too few; use {least} or more, or null")
        if self.feature_expansion < 1:
            raise ValueError(f"feature_expansion: {self.feature_expansion} leaves phi empty; use 1 or more")
        for name in ("sinks", "conv_taps", "slack"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 or more")
        if self.far != "features":
            if self.feature_map is not None:
                raise ValueError(f"feature_map: {self.far} weighs far keys without one; set feature_map: null")
            if self.far == "linformer" and self.window != "block":
                raise ValueError("far: linformer makes rows of whole blocks; set window: block")
            if self.far == "yoso" and (self.combine, self.norm) not in (("sum", "l2"), ("sum", "none")):
                raise ValueError("far: the sum of yoso's weights divides nothing; use combine: sum, norm: l2 or none")
        elif self.window is None and self.feature_map is None:
            raise ValueError("feature_map: without a window and without a feature map nothing attends; set one of them")
        if self.sinks and self.window is None:
            raise ValueError(f"sinks: {self.sinks} sinks need a window; set window or sinks: 0")
        if self.state == "delta" and (self.window is None if self.combine == "shared" else self.norm == "sum"):
            raise ValueError(
                "state: the far mass of the delta rule may be 0, so it cannot be the denominator alone; "
                "use combine: shared with a window, or combine: sum with norm: none or rms"
            )
        if self.local != "softmax" and self.combine == "shared":
            raise ValueError(f"local: {self.local} has no denominator that far keys could share; use combine: sum")
        if self.window is not None and self.sinks > self.window_size:
            raise ValueError(f"sinks: {self.sinks} sinks do not fit a window of {self.window_size}; use fewer sinks")

    @property
    def has_far(self) -> bool:
        """Whether keys outside the window take part."""
        return self.feature_map is not None or self.far != "features"

    @property
    def near_reach(self) -> int:
        """How many tokens before a query the window may still look at."""
        return {None: 0, "sliding": self.window_size - 1, "block": self.window_size - 1,
                "terrace": 2 * self.window_size - 1}[self.window]

    @property
    def reach(self) -> int:
        """How many tokens before a query the window or the convolution may still look at."""
        return max(self.near_reach, self.conv_taps - 1)

    @property
    def ring_size(self) -> int:
        """Recent tokens the cache keeps raw."""
        return self.reach + self.slack

    @property
    def kept_tokens(self) -> int | None:
        """How many tokens the cache keeps of kept heads at most, sinks among them; None: all."""
        return None if self.kept_window is None else self.sinks + self.kept_window + self.slack

    def to_dict(self) -> dict:
        return asdict(self)


PRESETS: dict[str, LinearAttentionConfig] = {
    # The union of both papers, with a far branch that neither position nor length breaks: maps of un-rotated keys, the
    # gated delta rule, sinks at a capped distance. Starts as plain window + sinks.
    "augmented": LinearAttentionConfig(sink_distance=1024, feature_expansion=2, state="delta", far_weight="query"),
    # Linearized-LLM as its text describes it (arXiv 2406.07368, section 4).
    "augmented-icml": LinearAttentionConfig(
        window="block", sinks=0, feature_map="elu1", rope="after", combine="sum", norm="sum"
    ),
    # What its code does: cosines all through, and no denominators.
    "augmented-relu2": LinearAttentionConfig(
        window="block", sinks=0, local="relu2", feature_map="l2", rope="after", combine="sum", norm="none"
    ),
    # Mixed chunk attention of a FLASH model (arXiv 2202.10447) with Linearized-LLM's convolution. Its linear branch is
    # a mean over far keys, where the published sum over G grows with the text.
    "flash": LinearAttentionConfig(
        window="block", window_size=256, sinks=0, local="laplace", feature_map="identity", rope="after", combine="sum",
        far_start=1.0, norm="count",
    ),
    # LoLCATs (arXiv 2410.10254): window of the own and the previous 64-token block, gate, no convolution.
    "lolcats": LinearAttentionConfig(
        window="terrace", sinks=0, feature_map="hedgehog", rope="after", far_weight="one", conv_taps=0
    ),
    # Hedgehog (arXiv 2402.04347) and T2R (arXiv 2103.13076): linear attention alone.
    "hedgehog": LinearAttentionConfig(
        window=None, sinks=0, feature_map="hedgehog", rope="after", far_weight="one", conv_taps=0
    ),
    "t2r": LinearAttentionConfig(window=None, sinks=0, feature_map="t2r", rope="after", far_weight="one", conv_taps=0),
    # Training-free sliding window + sinks (arXiv 2309.17453): what every conversion must beat.
    "swa": LinearAttentionConfig(sink_distance=1024, feature_map=None, conv_taps=0),
    # `augmented` for encoders. Nothing comes before anything else there, so the state has no gates. The sink is [CLS].
    "augmented-encoder": LinearAttentionConfig(sinks=1, feature_expansion=2, far_weight="query", conv_taps=16),
}

_PLAIN = LinearAttentionConfig(window=None, sinks=0, rope="after", combine="sum", far_start=1.0, conv_taps=0)
# The linear attentions that Linearized-LLM (arXiv 2406.07368, tables 1-3 and 16) compares, as published.
BASELINES: dict[str, LinearAttentionConfig] = {
    # FLASH (arXiv 2202.10447): its quadratic part within groups, and its linear part.
    "flash-local": replace(_PLAIN, window="block", local="relu2", feature_map=None),
    "flash-global": replace(_PLAIN, feature_map="l2", norm="count"),
    "linformer": replace(
        _PLAIN, window="block", feature_map=None, far="linformer", combine="shared", far_weight="learned"
    ),
    "performer": replace(_PLAIN, feature_map="favor"),
    "transnormer": replace(_PLAIN, feature_map="elu1", norm="rms"),
    "yoso": replace(_PLAIN, feature_map=None, far="yoso", norm="l2"),
    "relu": replace(_PLAIN, feature_map="relu"),
    # Twice the features: signed ones leave a denominator that may come near 0.
    "rfa": replace(_PLAIN, feature_map="rfa", feature_expansion=2),
}


def _augmented(config: LinearAttentionConfig, conv: bool, group: bool) -> LinearAttentionConfig:
    """A baseline with the convolution, and with softmax within groups beside it, which its far branch leaves out and,
    at the start, leaves alone."""
    if group:
        config = replace(config, window="block", combine="sum", far_start=0.0)
        if not config.has_far:
            config = replace(config, feature_map="l2", norm="none")
    return replace(config, conv_taps=32) if conv else config


AUGMENTATIONS = {"": (False, False), "+conv": (True, False), "+group": (False, True), "+conv+group": (True, True)}
PRESETS |= {
    name + suffix: _augmented(config, *parts)
    for name, config in BASELINES.items()
    for suffix, parts in AUGMENTATIONS.items()
}


def window_alone(config: LinearAttentionConfig) -> LinearAttentionConfig:
    """The near branch of `config` and nothing else; the published window where it has none."""
    own = config if config.window is not None else PRESETS["swa"]
    kept = ("window", "window_size", "sinks", "sink_distance")
    return replace(PRESETS["swa"], **{name: getattr(own, name) for name in kept})
