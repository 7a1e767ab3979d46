"""What a layer can minimise in attention transfer: functions of its inputs and of the softmax output that it replaces.

All but the KL divergence are errors relative to the teacher, so they start near 1 in every layer, whatever the scale
of its values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from linearize.layers.attention import BRANCHES, LinearAttention
from linearize.layers.kernels import contract
from linearize.layers.seam import Inputs, attend
from linearize.layers.tokens import locate, near
from linearize.recipes.training import WEIGHTS_PREFIX

# Added to attention weights before the logarithm: a key that the student does not see at all, as before its far branch
# has learned anything, costs a finite divergence with a gradient. A twentieth of an even share of 512 keys.
SMOOTHING = 1e-4
# Far masses below 1% count as 1%, squared: the relative error of next to nothing would be noise.
FAR_FLOOR = 1e-4


def softmax_mask(
    segments: Tensor | None, length: int, sliding_window: int | None, device: torch.device, causal: bool = True
) -> Tensor:
    """[1 or B, T, T] whether the softmax model lets a query see a key. Padding sees padding: a row without any key
    would be NaN."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index
    mask = (distance.abs() < (sliding_window or length))[None]
    if causal:
        mask = mask & (distance >= 0)
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return mask


@contextmanager
def only(layer: LinearAttention, branches: frozenset[str]) -> Iterator[None]:
    """Inside, no other branches of the layer take part."""
    before, layer.branches = layer.branches, branches
    try:
        yield
    finally:
        layer.branches = before


@dataclass
class Example:
    """One call of one layer.

    Attributes:
        target: [B, T, H, D_v], the softmax output.
        sliding_window: of the softmax model's layer, or None.
        branches: of the layer that make its output.
    """

    module: nn.Module
    inputs: Inputs
    value: Tensor
    scaling: float | None
    target: Tensor
    sliding_window: int | None
    branches: frozenset[str] = BRANCHES

    @property
    def crosses(self) -> bool:
        """Whether the keys are those of another sequence."""
        return self.module.linear_attention.crosses

    @property
    def segments(self) -> Tensor | None:
        """[B, T] of the queries, which are not told where the keys are another sequence's."""
        return None if self.crosses else self.inputs.segments

    def output(self, branches: frozenset[str]) -> Tensor:
        """[B, T, H, D_v] of the layer."""
        with only(self.module.linear_attention, branches):
            return attend(self.module, self.inputs, self.value, self.scaling)

    @cached_property
    def weights(self) -> "AttentionWeights":
        """Of the first `WEIGHTS_PREFIX` tokens."""
        length = min(self.value.shape[2], WEIGHTS_PREFIX)
        prefix = {
            name: x if x is None else x[:, :, :length]
            for name in ("q", "k", "raw_q", "raw_k", "sink_q")
            for x in [getattr(self.inputs, name)]
        }
        segments = self.inputs.segments
        if segments is not None:
            segments = segments[:, :length]
        inputs = replace(self.inputs, **prefix, segments=segments)
        layer = self.module.linear_attention
        batch, kv_heads, device = *inputs.k.shape[:2], inputs.k.device

        # With one-hot values, row i of the output is the weights that query i gives to the keys.
        one_hot = torch.eye(length, device=device).expand(batch, kv_heads, length, length)
        with only(layer, BRANCHES - {"conv"}):
            student = attend(self.module, inputs, one_hot, self.scaling).transpose(1, 2)
        with torch.autocast(device.type, enabled=False):
            scale = inputs.q.shape[-1] ** -0.5 if self.scaling is None else self.scaling
            scores = contract(inputs.q.float() * scale, inputs.k.float().mT)
            mask = softmax_mask(segments, length, self.sliding_window, device, layer.causal)
            teacher = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)

        visible = softmax_mask(segments, length, None, device, layer.causal)
        if segments is None:
            position = torch.arange(length, device=device)[None]
        else:
            nothing = segments.new_zeros(batch)
            position = locate(segments, nothing, nothing).position
        far = visible & ~near(layer.config, position, position)
        return AttentionWeights(teacher, student, visible[:, None], far[:, None], segments)


@dataclass
class AttentionWeights:
    """What queries give to keys, fp32.

    Attributes:
        teacher, student: [B, H, Q, K].
        visible: [1 or B, 1, Q, K] what a query may see; far: what of it is outside the layer's window and sinks.
        segments: [B, Q] or None.
    """

    teacher: Tensor
    student: Tensor
    visible: Tensor
    far: Tensor
    segments: Tensor | None


def total(x: Tensor, segments: Tensor | None) -> Tensor:
    """[B], sum of x [B, T, ..] over a sequence's tokens that are no padding."""
    if segments is not None:
        x = x * (segments > 0).view(*segments.shape, *[1] * (x.dim() - 2))
    return x.flatten(1).sum(1)


def relative_error(output: Tensor, target: Tensor, segments: Tensor | None) -> Tensor:
    """Mean over sequences of |output - target|^2 / |target|^2 over tokens that are no padding; both [B, T, H, D_v]."""
    output, target = output.float(), target.float()
    return (total((output - target).square(), segments) / total(target.square(), segments)).mean()


def output_mse(example: Example) -> Tensor:
    """Relative squared error of the output (LoLCATs, arXiv 2410.10254, made independent of the layer's scale)."""
    return relative_error(example.output(example.branches), example.target, example.segments)


def linear_mse(example: Example) -> Tensor:
    """The same of the linear branch alone. What sees nothing far has no output there and counts as an error of 1."""
    return relative_error(example.output(frozenset({"linear"})), example.target, example.segments)


def weights_kl(example: Example) -> Tensor:
    """KL(softmax weights || layer's weights), mean over queries and heads (Hedgehog, arXiv 2402.04347)."""
    weights = example.weights

    def distribution(x: Tensor) -> Tensor:
        x = (x.clamp(min=0) + SMOOTHING) * weights.visible
        return x / x.sum(-1, keepdim=True)

    teacher, student = distribution(weights.teacher), distribution(weights.student)
    ratio = torch.where(weights.visible, teacher, 1).log() - torch.where(weights.visible, student, 1).log()
    divergence = (teacher * ratio).sum(-1).transpose(1, 2)  # (B, Q, H)
    return (total(divergence, weights.segments) / total(torch.ones_like(divergence), weights.segments)).mean()


def far_mass(example: Example) -> Tensor:
    """What the window leaves out: error of the far keys' share of the weights + error of that share times their mean
    value, i.e. of what they add to the output.

    Both are relative to the teacher's far part, not to the whole: a layer cannot meet them by its window, and one
    whose far branch is silent has an error of 1 + 1, be its far share a few percent or most of it.
    """
    weights = example.weights
    length = weights.far.shape[-1]
    with torch.autocast(weights.far.device.type, enabled=False):
        value = example.value[:, :, :length].float()
        error = 0
        for values, whole in (
            (torch.ones_like(value[..., :1]), torch.ones_like(example.target[:, :length, :, :1])),
            (value, example.target[:, :length]),
        ):
            teacher, student = (
                contract(x * weights.far, values).transpose(1, 2) for x in (weights.teacher, weights.student)
            )
            scale = total(teacher.square(), weights.segments)
            scale = scale + FAR_FLOOR * total(whole.float().square(), weights.segments)
            error = error + (total((student - teacher).square(), weights.segments) / scale).mean()
    return error


# The names are those of `recipes.training.Objectives`.
OBJECTIVES: dict[str, Callable[[Example], Tensor]] = {
    function.__name__: function for function in (output_mse, linear_mse, weights_kl, far_mass)
}
