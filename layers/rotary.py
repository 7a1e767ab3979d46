"""The rotary embedding of an attention module, whatever its family: taken away from the family's own code, so that q
and k arrive un-rotated, and done here, by the family's own function or by a kernel that does the same.
"""

import inspect
import sys
from functools import lru_cache, wraps

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .kernels import triton_kernels


def is_rotary(module: nn.Module) -> bool:
    """Whether an attention module is handed a rotary embedding."""
    return "position_embeddings" in inspect.signature(type(module).forward).parameters


def rotary_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that make cos and sin of positions."""
    return [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]


def rotate_function(module: nn.Module):
    family = sys.modules[inspect.unwrap(type(module).forward).__module__]
    return getattr(family, "apply_rotary_pos_emb", None)


def rotates_pairs(module: nn.Module) -> bool:
    rotate = rotate_function(module)
    return rotate is not None and list(inspect.signature(rotate).parameters)[:4] == ["q", "k", "cos", "sin"]


def skip_nothing(module: nn.Module) -> None:
    """Let a family's function give back q, k where it would rotate them by `nothing`, which takes it ten launches."""
    rotate = rotate_function(module)
    if rotate is None or hasattr(rotate, "skips_nothing"):
        return

    @wraps(rotate)
    def rotate_or_not(q, k, cos, *args, **kwargs):
        if not hasattr(cos, "rotates_nothing"):
            return rotate(q, k, cos, *args, **kwargs)
        cos.dim()  # which a `Watch` notices
        return q, k

    rotate_or_not.skips_nothing = True
    sys.modules[inspect.unwrap(type(module).forward).__module__].apply_rotary_pos_emb = rotate_or_not


@lru_cache(maxsize=32)
def _one_and_zero(dtype: torch.dtype, device: torch.device, inference: bool) -> tuple[Tensor, Tensor]:
    """Of no dimension; tensors made in inference mode cannot take part in training."""
    return torch.ones((), dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)


def nothing(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin like these, that rotate by nothing."""
    found = _one_and_zero(rotary[0].dtype, rotary[0].device, torch.is_inference_mode_enabled())
    cos, sin = (x.expand(like.shape) for x, like in zip(found, rotary, strict=True))
    cos.rotates_nothing = True
    return cos, sin


class Watch(TorchFunctionMode):
    """Notices whether a tensor is used; entered for one call of an attention module, left by its attention function."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.tensor, self.used = tensor, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.used = self.used or any(x is self.tensor for x in args)
        return func(*args, **(kwargs or {}))


def with_capped(module: nn.Module, args: tuple, kwargs: dict, output: tuple[Tensor, Tensor], distance: int):
    """cos and sin that a rotary embedding has given, followed, in the last dimension, by those of positions no further
    on than `distance`."""
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    call.arguments["position_ids"] = call.arguments["position_ids"].clamp(max=distance)
    capped = module.forward(*call.args, **call.kwargs)
    return tuple(torch.cat(pair, dim=-1) for pair in zip(output, capped, strict=True))


def rotated(
    module: nn.Module, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor], sink_rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k as the family's own code rotates them, and q as sinks see it, where they see it otherwise."""
    rotate, fused = rotate_function(module), triton_kernels.rotate
    if fused is not None and q.is_cuda and fused.takes(q, k, *rotary) and _pairs_halves(rotate):
        return fused.rotate(q, k, *rotary, *(sink_rotary or ()))
    size = rotary[0].shape[-1]

    def turned(k, angles):
        # Where rotation is partial, it is of the first dimensions.
        found = rotate(q[..., :size], k[..., :size], *angles)
        return (torch.cat([new, x[..., size:]], dim=-1).to(x.dtype) for new, x in zip(found, (q, k), strict=True))

    sink_q = None if sink_rotary is None else next(turned(k[:, :1], sink_rotary))
    return *turned(k, rotary), sink_q


@lru_cache(maxsize=64)
def _pairs_halves(rotate) -> bool:
    """Whether a family's function pairs the first half of a head with the second, as most do; by trying."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 3, 8, generator=generator, device="cpu") for _ in range(2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator, device="cpu") for _ in range(2))

    def expected(x):
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]

    try:
        found = rotate(q, k, cos, sin)
    except (RuntimeError, TypeError, IndexError):
        return False
    return all(torch.allclose(x, expected(y), atol=1e-5) for x, y in zip(found, (q, k), strict=True))
