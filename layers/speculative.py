"""Speculative decoding with Medusa heads, for transformers' `generate(custom_generate=model.speculate)`: what plain
decoding returns, in fewer forward passes (see `decoding`)."""

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from .cache import LinearCacheLayer
from .decoding import Choice, decode, unsupported
from .draft import COPIED, DraftTree
from .graphs import works_on
from .medusa import MedusaHeads

HEADS_FILE = "medusa_heads.safetensors"
GENERATE_FILE = "custom_generate/generate.py"


def attach_heads(model, heads: MedusaHeads, trees: dict[int, DraftTree]) -> None:
    """Let `model.speculate` draft with `heads`.

    Args:
        trees: by the fewest sequences at once that each is for, one among them.

    Raises:
        ValueError: when the heads are of another model, or too few for a tree.
    """
    size, theirs = model.get_output_embeddings().in_features, heads.blocks[0].out_features
    if theirs != size:
        raise ValueError(f"heads are of a model with {theirs} hidden units, this one has {size}")
    slack = min(layer.config.slack for layer in model.linear_attentions().values())
    for tree in trees.values():
        if tree.heads > len(heads.blocks) or max(tree.depths) > min(slack, COPIED):
            raise ValueError(
                f"the tree is {max(tree.depths)} guesses deep and asks {tree.heads} heads; there are "
                f"{len(heads.blocks)} heads, {COPIED} copied tokens, and {slack} tokens that the cache keeps in "
                "reserve (slack)"
            )
    # Not a submodule: the model's own weights stay as they are.
    model.__dict__["draft"] = heads.eval(), trees


def load_heads(model) -> None:
    """Attach what an exported directory carries.

    Raises:
        ValueError: when the model came without heads.
    """
    found = getattr(model.config, "medusa", None)
    if found is None:
        raise ValueError("the model has no draft heads; convert it with a medusa section, or decode as usual")
    sequential = found.get("sequential", False)
    output = model.get_output_embeddings()
    # Its shapes alone: where accelerate brings weights for each call, there is nothing else to copy.
    like = nn.Linear(output.in_features, output.out_features, bias=output.bias is not None, device="meta")
    heads = MedusaHeads(like, found["heads"], found["projection"], sequential)
    heads.load_state_dict(load_file(cached_file(model.config.name_or_path, HEADS_FILE)), assign=True)
    nodes = found.get("nodes") or {"1": len(found["tree"]) + 1}
    attach_heads(model, heads, {int(rows): DraftTree.of(found["tree"][: n - 1]) for rows, n in nodes.items()})


def carry_heads(model, directory: Path) -> None:
    """Copy what speculative decoding needs from where a model came from to where it is saved, as transformers does
    with code; nothing where it came without heads."""
    if getattr(model.config, "medusa", None) is None:
        return
    for name in (HEADS_FILE, GENERATE_FILE):
        source, target = Path(cached_file(model.config.name_or_path, name)), directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


def speculate(
    model,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    token_streamer=None,
    typical_acceptance: float | None = None,
    **model_kwargs,
):
    """The decoding loop; arguments are those that `generate` prepares for its own loops.

    Args:
        token_streamer: gets one sequence, the prompt and then tokens as they are accepted (transformers hands its
            `streamer` to no loop but its own).
        typical_acceptance: epsilon of 0 to 1: accept each guess that the model gives more than
            min(epsilon, sqrt(epsilon) exp(-entropy)), as Medusa does (arXiv 2401.10774, section 2.3.1). Longer texts
            per step, which are no longer draws from the model's distribution.

    Raises:
        ValueError: for a model without heads, one whose other layers cannot verify trees, or settings of `generate`
            that this loop does not know or that contradict each other.
    """
    reason = unsupported(generation_config)
    if reason:
        raise ValueError(f"{reason}: speculative decoding does not do this; leave it out or decode without speculation")
    if typical_acceptance is not None and not 0 < typical_acceptance < 1:
        raise ValueError(f"typical_acceptance={typical_acceptance} is no share between 0 and 1, as 0.09 is")
    if typical_acceptance is not None and not generation_config.do_sample:
        raise ValueError("typical_acceptance is for sampling: pass do_sample=True, or leave it out")
    if "draft" not in model.__dict__:
        load_heads(model)
    cache = model_kwargs["past_key_values"]
    others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, LinearCacheLayer)}
    if others:
        raise ValueError(f"layers with {', '.join(sorted(others))} cannot verify a tree; decode without speculation")
    heads, trees = model.__dict__["draft"]
    tree = trees[max(rows for rows in trees if rows <= len(input_ids))]
    # Where the model is now.
    output = model.get_output_embeddings()
    draft = heads.to(works_on(output), output.weight.dtype), tree
    choose = Choice(logits_processor, generation_config.do_sample, typical_acceptance)
    if token_streamer is not None:
        # As `generate` does before loops of its own.
        token_streamer.put(input_ids.cpu())
    return decode(
        model, input_ids, choose, stopping_criteria, generation_config, model_kwargs, draft, token_streamer
    )
