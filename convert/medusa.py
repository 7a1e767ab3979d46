"""Stage medusa: heads that predict further tokens, trained on the frozen converted model."""

import statistics
import time
from collections.abc import Sequence
from copy import deepcopy

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linearize.convert import processes
from linearize.convert.batches import read_evenly
from linearize.convert.bench import Prompt, encode, generate
from linearize.convert.context import Artifact, Context, StageError, put
from linearize.convert.data import Documents, packed, problems_named, with_labels
from linearize.convert.models import load_weights, merged_model, read_tensors, to_bfloat16, train_only
from linearize.convert.progress import TokenProgress
from linearize.convert.training import label_weights, train
from linearize.layers.cache import LinearCache
from linearize.layers.decoding import Choice, Rows, Step
from linearize.layers.draft import COPIED, COPY, RANKS, DraftTree, copies
from linearize.layers.graphs import replayed
from linearize.layers.medusa import MedusaHeads
from linearize.recipes.evaluation import EvaluateSection
from linearize.recipes.schema import MedusaSection

# Tokens of the data that a text of the model's own begins with.
PROMPT = 32
# Tokens of such a text at most: in longer ones small models say the same without end, which any tree guesses.
LONGEST = 192
# Texts that it writes at once.
ROWS = 256
# Sizes of trees that are tried, and how often.
SIZES = (1, 4, 8, 16, 32, 64)
WARM_UP, REPEATS = 2, 5


class MedusaModel(nn.Module):
    """The converted model, frozen, and its heads."""

    def __init__(self, base: nn.Module, section: MedusaSection):
        super().__init__()
        self.base = base
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
        self.decay = decay

    def loss(self, model, batch, accumulation, step):
        loss = 0.0
        for i, (logits, labels) in enumerate(model(batch)):
            losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
            loss = loss + self.decay**i * (losses * label_weights(labels)).sum()
        return loss


@torch.no_grad()
def right_guesses(model: MedusaModel, sequences: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """[N, depths, RANKS + 1] bool, of N places of texts: whether the token so many places ahead is a head's guess of
    that rank, or what is copied (see `DraftTree.grown`).

    Raises:
        StageError: there is no such place.
    """
    found = []
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
            texts = ids.expand(places, -1)
            right[:, :, COPY] = copies(texts, torch.arange(places, device=device) + 2) == ahead
            found.append(right[ahead[:, 0] != -100].cpu())
    if not any(map(len, found)):
        raise StageError("medusa: no held-out text has a token that heads could guess; use more (evaluate.tokens)")
    return torch.cat(found)


def head_accuracy(right: Tensor, heads: int) -> list[dict]:
    """Per head the share of tokens that are its first, or among its first five, guesses; and by rank."""
    shares = right[:, :heads, :RANKS].float().mean(0).tolist()
    return [{"top1": share[0], "top5": sum(share[:5]), "ranks": share} for share in shares]


@torch.no_grad()
def fastest_tree(model: MedusaModel, right: Tensor) -> tuple[DraftTree, list[dict]]:
    """The tree that makes most tokens per second on this device, and what was measured: one sequence, per size the best
    tree, the tokens that it has accepted per step where guesses are `right`, and the milliseconds of a step."""
    base, best, found = model.base, None, []
    output = base.get_output_embeddings()
    heads = deepcopy(model.heads).to(output.weight.dtype)
    linear = next(iter(base.linear_attentions().values()))
    prompt = torch.randint(output.out_features, (1, 2 * linear.config.ring_size), device=output.weight.device)
    for nodes in SIZES:
        # An accepted path must fit what the cache keeps in reserve.
        tree = DraftTree.grown(right[:, : linear.config.slack], nodes)
        cache = LinearCache(base)
        base(prompt, past_key_values=cache, use_cache=True)
        rows = Rows(prompt, [])
        hidden = output.weight.new_zeros(1, output.in_features)
        step = replayed(Step(base, cache, Choice([], sample=False), rows, (heads, tree), prompt[:, -1], hidden))
        taken = []
        for _ in range(WARM_UP + REPEATS):
            began = time.perf_counter()
            # Waits for the device.
            step().cpu()
            taken.append(time.perf_counter() - began)
        seconds = statistics.median(taken[WARM_UP:])
        tokens = tree.expected(right)
        found.append({"nodes": len(tree.parents), "tokens": tokens, "ms": seconds * 1e3})
        if best is None or tokens / seconds > best[0]:
            best = tokens / seconds, tree
    return best[1], found


def own_prompts(context: Context, sources: Sequence[Documents], field: str, tokens: int) -> list[Tensor]:
    """What `tokens` tokens of the model's own text begin with: pieces of the sources, and, where the tokenizer has a
    chat template, every second one as a user's message.

    Raises:
        StageError: naming the recipe's `field`, when no document is long enough.
    """
    length = min(context.recipe.medusa.length, LONGEST)
    pieces = [
        document[start : start + PROMPT]
        for document in read_evenly([iter(source) for source in sources], tokens)
        for start in range(0, len(document) - PROMPT, length)
    ][: -(-tokens // length)]
    if not pieces:
        raise StageError(f"medusa.own_text: no document of {field} has more than {PROMPT} tokens to go on from")
    tokenizer = context.tokenizer
    if tokenizer.chat_template is not None:
        for index in range(1, len(pieces), 2):
            text = tokenizer.decode(pieces[index], skip_special_tokens=True)
            pieces[index] = encode(tokenizer, [{"role": "user", "content": text}])
    return pieces


def own_texts(context: Context, base: nn.Module, prompts: list[Tensor], name: str) -> list[Tensor]:
    """What the model says, greedily, after prompts, these included; batches that were written before are read.

    Args:
        name: of their directory in the stage's.
    """
    directory, length = context.stage_directory("medusa") / name, min(context.recipe.medusa.length, LONGEST)
    directory.mkdir(parents=True, exist_ok=True)
    texts = []
    with TokenProgress(context.console, len(prompts), length) as bar:
        for start in range(0, len(prompts), ROWS):
            path, part = directory / f"{start:06}.safetensors", prompts[start : start + ROWS]
            if not path.exists():
                longest = max(map(len, part))
                found = generate(base, [Prompt(ids, "") for ids in part], max(1, length - longest))
                rows = {f"{row:06}": torch.cat(pair) for row, pair in enumerate(zip(part, found.tokens, strict=True))}
                save_file(rows, path.with_suffix(".part"))
                put(path.with_suffix(".part"), path)
            written = read_tensors(path)
            texts += [written[row] for row in sorted(written)]
            bar.show(len(texts), "text of its own")
    return texts


def heldout_sequences(context: Context, base: nn.Module, section: MedusaSection) -> list[dict[str, Tensor]]:
    """What heads are measured on: held-out data, or the model's own text after pieces of it."""
    sources, tokens = context.recipe.data.heldout, (context.recipe.evaluate or EvaluateSection()).tokens
    if section.own_text is None:
        size = -(-tokens // section.length)
        return packed("data.heldout", sources, context.tokenizer, section.length, size).sequences
    documents = [Documents(source, context.tokenizer) for source in sources]
    with problems_named("data.heldout", sources):
        prompts = own_prompts(context, documents, "data.heldout", tokens)
    sequences = []
    for prompt, text in zip(prompts, own_texts(context, base, prompts, "own_heldout"), strict=True):
        sequence = with_labels(text, torch.arange(len(text)) == 0)
        sequence["labels"][: len(prompt)] = -100
        sequences.append(sequence)
    return sequences


def run(context: Context) -> Artifact:
    section = context.recipe.medusa
    torch.manual_seed(context.recipe.seed)
    base = merged_model(context).to(context.device)
    if section.bf16:
        to_bfloat16(base)
    documents = None
    if section.own_text is not None:
        prompts = own_prompts(context, context.training_documents, "data.train", section.own_text)
        documents = [processes.alone(own_texts, context, base, prompts, "own_text")]
    model = MedusaModel(base, section)
    losses = train(context, "medusa", model, WeightedHeads(section.decay), section, documents=documents)
    measured = processes.alone(measured_heads, context, model.eval())
    return Artifact(context.stage_directory("medusa"), {"loss": losses, **measured})


def measured_heads(context: Context, model: MedusaModel) -> dict:
    """How often heads and copies are right on held-out text, and the tree that follows from it."""
    right = right_guesses(model, heldout_sequences(context, model.base, context.recipe.medusa), context.device)
    tree, sizes = fastest_tree(model, right)
    return {
        "head_accuracy": head_accuracy(right, len(model.heads.blocks)),
        "copy_accuracy": right[:, :, COPY].float().mean(0).tolist(),
        "tree": tree.paths,
        "tree_sizes": sizes,
    }


def trained_draft(context: Context, base: nn.Module) -> tuple[MedusaHeads, DraftTree]:
    """The heads that the stage trained, and the tree that it found for them."""
    model = MedusaModel(base, context.recipe.medusa)
    load_weights(model, context.stage_directory("medusa"))
    return model.heads, DraftTree.of(context.state("medusa")["metrics"]["tree"])
