"""What a recipe may say about attention: the layer that replaces softmax, and the heads that stay softmax."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, Field, create_model, model_validator

from linearize.layers.config import AUGMENTATIONS, BASELINES, PRESETS, LinearAttentionConfig
from linearize.recipes.fields import Positive, Section, TextKeys

_attention_fields = {field.name: (field.type, field.default) for field in fields(LinearAttentionConfig)}


def _known(name: str) -> str:
    if name in PRESETS:
        return name
    close = get_close_matches(name, PRESETS, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    own = ", ".join(preset for preset in PRESETS if preset.partition("+")[0] not in BASELINES)
    endings = ", ".join(filter(None, AUGMENTATIONS))
    raise ValueError(f"no preset {name!r}{hint}; there are {own}, and, also with {endings}, {', '.join(BASELINES)}")


class AttentionSection(create_model("_AttentionFields", __base__=Section, **_attention_fields)):
    """A preset and what differs from it: `preset` plus any field of `LinearAttentionConfig`."""

    preset: Annotated[str, AfterValidator(_known)] = "augmented"

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        preset = value.get("preset", cls.model_fields["preset"].default)
        known = isinstance(preset, str) and preset in PRESETS
        return {**PRESETS[preset].to_dict(), **value} if known else value

    @model_validator(mode="after")
    def _contradictions(self) -> "AttentionSection":
        _ = self.config
        return self

    @property
    def config(self) -> LinearAttentionConfig:
        """The layer's configuration, preset and overrides merged."""
        return LinearAttentionConfig(**self.model_dump(exclude={"preset"}))


Indices = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class KeepSection(Section):
    """Key heads that stay softmax, with the query heads of their group; exactly one of the first three says which.

    Attributes:
        kv_budget: share of the model's key heads, i.e. of its KV cache, rounded down; which ones is measured.
        layers: all heads of the layers of these indices.
        heads: layer index -> key heads.
        texts: texts of the training data to measure on.
        length: tokens of each of them; they are said again after that, as they are and in pieces.
    """

    kv_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    layers: Indices | None = None
    heads: Annotated[dict[str, Indices], TextKeys, Field(min_length=1)] | None = None
    texts: Positive = 4
    length: Annotated[int, Field(ge=2)] = 512

    @model_validator(mode="after")
    def _one_choice(self) -> "KeepSection":
        given = [name for name in ("kv_budget", "layers", "heads") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of kv_budget, layers and heads, not {' and '.join(given) or 'none'}")
        return self
