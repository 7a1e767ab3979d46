"""Stage medusa: heads that predict further tokens, trained on the frozen converted model."""

import statistics
import time

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from linearize.convert.batches import read_evenly
from linearize.convert.context import Artifact, Context, StageError
from linearize.convert.data import PackedDataset, packed
from linearize.convert.models import load_weights, merged_model, train_only
from linearize.convert.progress import TokenProgress
from linearize.convert.training import train
from linearize.layers.cache import LinearCache
from linearize.layers.draft import DraftTree
from linearize.layers.medusa import MedusaHeads
from linearize.recipes.evaluation import EvaluateSection
from linearize.recipes.schema import MedusaSection

# Tokens of the data that a text of the model's own begins with, and texts that it writes at once.
PROMPT = 32
ROWS = 32
# Guesses of a head that a tree may take, sizes of trees that are tried, and how often.
RANKS = 10
SIZES = (1, 4, 8, 16, 32, 64)
REPEATS = 5


class MedusaModel(nn.Module):
    """The converted model, frozen, and its heads."""

    def __init__(self, base: nn.Module, section: MedusaSection):
        super().__init__()
        self.base = base
        self.heads = MedusaHeads(base.get_output_embeddings(), section.heads, section.projection)
        train_only(self, lambda name: name.startswith("heads."))

    def train(self, mode: bool = True):
        """Training mode is for the heads: what they learn from is the model as it is used."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per head (logits [N, V], labels [N]) of a batch of packed sequences."""
        with torch.no_grad():
            hidden = self.base.base_model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
        pairs = []
        for i, logits in enumerate(self.heads(hidden, self.base.get_output_embeddings())):
            ahead = i + 2
            # A label counts if no document begins on the way to it: positions then go on without a restart.
            labels, position = batch["labels"][:, ahead:], batch["position_ids"]
            same = position[:, ahead:] - position[:, :-ahead] == ahead
            pairs.append((logits[:, :-ahead].flatten(0, 1), torch.where(same, labels, -100).flatten()))
        return pairs


class WeightedHeads:
    """Sum over heads of decay^i * cross-entropy."""

    is_local = False

    def __init__(self, decay: float):
        self.decay = decay

    def loss(self, model, batch, accumulation, step):
        losses = [nn.functional.cross_entropy(logits.float(), labels) for logits, labels in model(batch)]
        return sum(self.decay**i * loss for i, loss in enumerate(losses))


def head_accuracy(model: MedusaModel, data: PackedDataset, device: torch.device) -> list[dict]:
    """Per head the share of held-out tokens that are its first, or among its first five, guesses; and by rank."""
    count = len(model.heads.blocks)
    hits, total = torch.zeros(count, RANKS), torch.zeros(count, 1)
    for sequence in data.sequences:
        batch = {name: value[None].to(device) for name, value in sequence.items()}
        with torch.no_grad():
            for i, (logits, labels) in enumerate(model(batch)):
                counted = labels != -100
                right = logits[counted].topk(RANKS).indices == labels[counted, None]
                hits[i] += right.sum(0).cpu()
                total[i] += counted.sum().cpu()
    shares = (hits / total).tolist()
    return [{"top1": share[0], "top5": sum(share[:5]), "ranks": share} for share in shares]


@torch.no_grad()
def fastest_tree(model: MedusaModel, accuracy: list[list[float]]) -> tuple[DraftTree, list[dict]]:
    """The tree that makes most tokens per second on this device, and what was measured: one sequence, per size the best
    tree, the tokens that it is expected to have accepted per step, and the milliseconds of a step."""
    base, output, best, found = model.base, model.base.get_output_embeddings(), None, []
    device, hidden = output.weight.device, output.weight.new_zeros(1, 1, output.in_features)
    linear = next(iter(base.linear_attentions().values()))
    cache = LinearCache(base)
    prompt = torch.randint(output.out_features, (1, 2 * linear.config.ring_size), device=device)
    base(prompt, past_key_values=cache, use_cache=True)
    for nodes in SIZES:
        # An accepted path must fit what the cache keeps in reserve.
        tree = DraftTree.grown(accuracy[: linear.config.slack], nodes)
        ancestors, depths = tree.ancestors.to(device), torch.tensor(tree.depths, device=device)
        taken = []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            with cache.verifying(ancestors):
                out = base(
                    torch.zeros_like(depths)[None], position_ids=cache.length[:, None] + depths, past_key_values=cache,
                    use_cache=True,
                )  # fmt: skip
            model.heads(hidden, output)
            cache.accept(torch.zeros(1, 1, dtype=torch.long, device=device))
            # Waits for the device.
            out.logits.argmax().item()
            taken.append(time.perf_counter() - began)
        step = statistics.median(taken[1:])
        found.append({"nodes": len(depths), "tokens": tree.expected(accuracy), "ms": step * 1e3})
        if best is None or tree.expected(accuracy) / step > best[0]:
            best = tree.expected(accuracy) / step, tree
    return best[1], found


@torch.no_grad()
def own_texts(context: Context, base: nn.Module, section: MedusaSection) -> list[torch.Tensor]:
    """What the model goes on with, greedily, after the first tokens of pieces of the training data, prompts included;
    batches that were written before are read.

    Raises:
        StageError: no document is long enough to go on from.
    """
    directory = context.stage_directory("medusa") / "own_text"
    directory.mkdir(parents=True, exist_ok=True)
    sources = [iter(source) for source in context.training_documents]
    pieces = [
        document[start : start + PROMPT]
        for document in read_evenly(sources, section.own_text)
        for start in range(0, len(document) - PROMPT, section.length)
    ]
    pieces = pieces[: -(-section.own_text // section.length)]
    if not pieces:
        raise StageError(f"medusa.own_text: no document of data.train has more than {PROMPT} tokens to go on from")
    eos = base.generation_config.eos_token_id
    ends = torch.tensor(eos if isinstance(eos, list) else [] if eos is None else [eos])
    texts = []
    with TokenProgress(context.console, len(pieces), section.length) as bar:
        for start in range(0, len(pieces), ROWS):
            path = directory / f"{start:06}.safetensors"
            if not path.exists():
                prompts = torch.stack(pieces[start : start + ROWS]).to(context.device)
                rows = base.generate(
                    prompts, attention_mask=torch.ones_like(prompts), max_length=section.length, do_sample=False,
                    pad_token_id=0,
                ).cpu()  # fmt: skip
                save_file({"ids": rows}, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            for row in load_file(path)["ids"]:
                ended = torch.isin(row[PROMPT:], ends).nonzero()
                texts.append(row[: PROMPT + int(ended[0]) + 1] if len(ended) else row)
            bar.show(len(texts), "text of its own")
    return texts


def run(context: Context) -> Artifact:
    section = context.recipe.medusa
    torch.manual_seed(context.recipe.seed)
    base = merged_model(context)
    documents = None if section.own_text is None else [own_texts(context, base, section)]
    model = MedusaModel(base, section)
    losses = train(context, "medusa", model, WeightedHeads(section.decay), section, documents=documents)
    tokens = (context.recipe.evaluate or EvaluateSection()).tokens
    data = packed(
        "data.heldout", context.recipe.data.heldout, context.tokenizer, section.length, -(-tokens // section.length)
    )
    accuracy = head_accuracy(model.eval(), data, context.device)
    tree, sizes = fastest_tree(model, [head["ranks"] for head in accuracy])
    metrics = {"loss": losses, "head_accuracy": accuracy, "tree": tree.paths, "tree_sizes": sizes}
    return Artifact(context.stage_directory("medusa"), metrics)


def trained_draft(context: Context, base: nn.Module) -> tuple[MedusaHeads, DraftTree]:
    """The heads that the stage trained, and the tree that it found for them."""
    model = MedusaModel(base, context.recipe.medusa)
    load_weights(model, context.stage_directory("medusa"))
    return model.heads, DraftTree.of(context.state("medusa")["metrics"]["tree"])
