"""Stage medusa: heads that predict further tokens, trained on the frozen converted model."""

import statistics
import time
from copy import deepcopy

import torch
from torch import Tensor, nn

from linearize.convert import processes
from linearize.convert.context import Artifact, Context, StageError
from linearize.convert.data import packed
from linearize.convert.models import load_weights, merged_model, to_bfloat16, train_only
from linearize.convert.own_text import answer, own_prompts, own_texts
from linearize.convert.training import label_weights, train
from linearize.convert.tree import Places, grown, tokens_per_step
from linearize.layers.cache import LinearCache
from linearize.layers.decoding import Choice, Rows, Step
from linearize.layers.draft import COPIED, COPY, RANKS, DraftTree, copies
from linearize.layers.graphs import Replay
from linearize.layers.medusa import MedusaHeads
from linearize.recipes.evaluation import EvaluateSection
from linearize.recipes.schema import MedusaSection

# Sizes of trees that are tried, for so many sequences at once, and how often.
SIZES = (1, 4, 8, 16, 32, 64)
BATCHES = (1, 4, 16, 64)
WARM_UP, REPEATS = 2, 5


class MedusaModel(nn.Module):
    """The converted model, frozen, and its heads."""

    def __init__(self, base: nn.Module, section: MedusaSection):
        super().__init__()
        self.base = base
        # Its sizes are what `auto` in a DeepSpeed configuration stands for.
        self.config = base.config
        self.heads = MedusaHeads(base.get_output_embeddings(), section.heads, section.projection, section.sequential)
        train_only(self, lambda name: name.startswith("heads."))

    def train(self, mode: bool = True):
        """Training mode is for the heads: what they learn from is the model as it is used."""
        super().train(mode)
        self.base.eval()
        return self

    def logits(self, batch: dict) -> list[Tensor]:
        """Per head [B, T, V], of a batch of packed sequences."""
        with torch.no_grad():
            hidden = self.base.base_model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
            embedded = self.base.get_input_embeddings()(batch["input_ids"])
        return self.heads(hidden, self.base.get_output_embeddings(), embedded)

    def guesses(self, batch: dict) -> Tensor:
        """[heads, T, RANKS] tokens, of one sequence."""
        return torch.stack([logits[0].topk(RANKS).indices for logits in self.logits(batch)])

    def forward(self, batch: dict) -> list[tuple[Tensor, Tensor]]:
        """Per head (logits [B, T, V], labels [B, T]) of a batch of packed sequences; T is less by the places ahead."""
        pairs = []
        for i, logits in enumerate(self.logits(batch)):
            ahead = i + 2
            # A label counts if no document begins on the way to it: positions then go on without a restart.
            labels, position = batch["labels"][:, ahead:], batch["position_ids"]
            same = position[:, ahead:] - position[:, :-ahead] == ahead
            pairs.append((logits[:, :-ahead], torch.where(same, labels, -100)))
        return pairs


class WeightedHeads:
    """Sum over heads of decay^i * cross-entropy."""

    calls_backward = is_local = False

    def __init__(self, decay: float):
        self.decay, self.parts = decay, {}

    def loss(self, model, batch, accumulation, step):
        loss = 0.0
        for i, (logits, labels) in enumerate(model(batch)):
            # Words last: along another dimension the softmax of so many takes three times as long.
            losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            loss = loss + self.decay**i * (losses * label_weights(labels).flatten()).sum()
        return loss


@torch.no_grad()
def right_guesses(model: MedusaModel, sequences: list[dict[str, Tensor]], device: torch.device) -> Places:
    """Where heads and copies are right in texts.

    Raises:
        StageError: there is no such place.
    """
    found, texts = [], []
    for sequence in sequences:
        batch = {name: value[None].to(device) for name, value in sequence.items()}
        ends = [*(batch["position_ids"][0, 1:] == 0).nonzero()[:, 0].add(1).tolist(), batch["input_ids"].shape[1]]
        guesses = model.guesses(batch)  # (heads, T, RANKS)
        for start, end in zip([0, *ends], ends, strict=False):
            ids, labels = batch["input_ids"][0, start:end], batch["labels"][0, start:end]
            places = end - start - 2
            if places < 1:
                continue
            # At place t the model has seen token t, token t + 1 is known, and those from t + 2 on are guessed.
            index = torch.arange(places, device=device)[:, None] + 2 + torch.arange(COPIED, device=device)
            ahead = torch.where(index < end - start, labels[index.clamp(max=end - start - 1)], -100)
            right = torch.zeros(places, COPIED, RANKS + 1, dtype=torch.bool, device=device)
            heads = guesses[:COPIED, start : start + places].transpose(0, 1)
            right[:, : heads.shape[1], :RANKS] = heads == ahead[:, : heads.shape[1], None]
            known = torch.arange(places, device=device) + 2
            right[:, :, COPY] = copies(ids.expand(places, -1), known) == ahead
            found.append(right[ahead[:, 0] != -100])
            texts.append(torch.full((len(found[-1]),), len(texts), device=device))
    if not any(map(len, found)):
        raise StageError("medusa: no held-out text has a token that heads could guess; use more (evaluate.tokens)")
    return Places(torch.cat(found), torch.cat(texts))


def head_accuracy(right: Tensor, heads: int) -> list[dict]:
    """Per head the share of tokens that are its first, or among its first five, guesses; and by rank."""
    shares = right[:, :heads, :RANKS].float().mean(0).tolist()
    return [{"top1": share[0], "top5": sum(share[:5]), "ranks": share} for share in shares]


@torch.no_grad()
def step_seconds(model: MedusaModel, tree: DraftTree, rows: int) -> float:
    """What a decoding step of so many sequences takes, the wait for its tokens included; the median."""
    base, output = model.base, model.base.get_output_embeddings()
    heads = deepcopy(model.heads).to(output.weight.dtype)
    ring_size = next(iter(base.linear_attentions().values())).config.ring_size
    prompt = torch.randint(output.out_features, (rows, 2 * ring_size), device=output.weight.device)
    cache = LinearCache(base)
    base(prompt, past_key_values=cache, use_cache=True)
    hidden = output.weight.new_zeros(rows, output.in_features)
    step = Step(base, cache, Choice([], sample=False), Rows(prompt, []), (heads, tree), prompt[:, -1], hidden)
    taken = []
    with Replay(base, cache) as run:
        for _ in range(WARM_UP + REPEATS):
            began = time.perf_counter()
            # Waits for the device.
            run(step).cpu()
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[WARM_UP:])


def fastest_trees(model: MedusaModel, places: Places) -> dict:
    """What makes most tokens per second on this device: `tree` and `nodes` as an export has them, and `tree_sizes`: per
    number of sequences and size the tokens that a step accepts at places of texts, and the milliseconds of a step."""
    slack = next(iter(model.base.linear_attentions().values())).config.slack
    # An accepted path must fit what the cache keeps in reserve.
    paths = grown(Places(places.right[:, :slack], places.text), max(SIZES))
    trees = {nodes: DraftTree.of(paths[: nodes - 1]) for nodes in SIZES if nodes <= len(paths) + 1}
    chosen, measured = {}, []
    # On a CPU larger batches would take minutes.
    for rows in BATCHES if places.text.is_cuda else BATCHES[:1]:
        best = 0.0
        for nodes, tree in trees.items():
            seconds, tokens = step_seconds(model, tree, rows), tokens_per_step(tree, places)
            measured.append({"sequences": rows, "nodes": nodes, "tokens": tokens, "ms": seconds * 1e3})
            if tokens / seconds > best:
                best, chosen[str(rows)] = tokens / seconds, nodes
        # More sequences leave less room for guesses.
        trees = {nodes: tree for nodes, tree in trees.items() if nodes <= chosen[str(rows)]}
    return {"tree": paths[: chosen["1"] - 1], "nodes": chosen, "tree_sizes": measured}


def run(context: Context) -> Artifact:
    section = context.recipe.medusa
    torch.manual_seed(context.recipe.seed)
    base = final_model(context)
    tokens, documents = (context.recipe.evaluate or EvaluateSection()).tokens, None
    if section.own_text is None:
        sources, size = context.recipe.data.heldout, -(-tokens // section.length)
        heldout = packed("data.heldout", sources, context.tokenizer, section.length, size).sequences
    else:
        prompts, asked = own_prompts(context, tokens)
        documents = [own_texts(context, base, prompts, "own_text")]
        # All processes write these, too, which none can by itself once ZeRO-3 has given each a part of the model.
        heldout = [answer(*pair) for pair in zip(asked, own_texts(context, base, asked, "own_heldout"), strict=True)]
    model = MedusaModel(base, section)
    steps = train(context, "medusa", model, WeightedHeads(section.decay), section, documents=documents)
    if section.deepspeed:
        # Each process may have a part of it.
        del base
        model = None
    measured = processes.alone(measured_heads, context, model, heldout)
    return Artifact(context.stage_directory("medusa"), {"loss": [step["loss"] for step in steps], **measured})


def final_model(context: Context) -> nn.Module:
    """The converted model that the heads are for, as they see it."""
    base = merged_model(context).to(context.device)
    if context.recipe.medusa.bf16:
        to_bfloat16(base)
    return base


def measured_heads(context: Context, model: MedusaModel | None, heldout: list[dict[str, Tensor]]) -> dict:
    """How often heads and copies are right on held-out text, and the tree that follows from it.

    Args:
        model: None reads it anew.
    """
    model = (model or trained_model(context, final_model(context))).eval()
    places = right_guesses(model, heldout, context.device)
    return {
        "head_accuracy": head_accuracy(places.right, len(model.heads.blocks)),
        "copy_accuracy": places.right[:, :, COPY].float().mean(0).tolist(),
        **fastest_trees(model, places),
    }


def trained_model(context: Context, base: nn.Module) -> MedusaModel:
    """`base` with the heads that the stage trained."""
    model = MedusaModel(base, context.recipe.medusa)
    load_weights(model, context.stage_directory("medusa"))
    return model


def trained_draft(context: Context, base: nn.Module) -> tuple[MedusaHeads, dict]:
    """The heads that the stage trained, and the trees that it found for them, as `export_model` takes them."""
    metrics = context.state("medusa")["metrics"]
    return trained_model(context, base).heads, {name: metrics[name] for name in ("tree", "nodes")}
