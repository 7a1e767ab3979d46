"""A recipe for an encoder, from its checkpoint to the exported model, and what it cannot ask for."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from linearize.convert.encoders import edges, embed, framed
from linearize.convert.finetune import HiddenStates, softmax_self
from linearize.convert.models import prepare_finetune
from linearize.layers.config import PRESETS
from linearize.layers.seam import install
from linearize.recipes.loader import RecipeError, load_recipe
from linearize.recipes.schema import FinetuneSection

from .runs import converted, state

TRAINING = {"batch_size": 2, "length": 48, "save_every": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def encoder(tiny_model, tmp_path_factory):
    """A directory with a random BERT that reads with the tiny model's words, between [CLS] and [SEP]."""
    directory = tmp_path_factory.mktemp("encoder") / "model"
    content = json.loads((tiny_model / "tokenizer.json").read_text())
    around = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("user", "assistant")]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [around[0], {"Sequence": {"id": "A", "type_id": 0}}, around[1]],
        "pair": [],
        "special_tokens": {
            token: {"id": token, "ids": [content["model"]["vocab"][token]], "tokens": [token]}
            for token in ("user", "assistant")
        },
    }
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(content))
    PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), unk_token="<unk>").save_pretrained(
        directory
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=256, max_position_embeddings=64, **sizes))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run(linearize, encoder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoder-run")
    content = {
        "name": "tiny-encoder",
        "output": str(directory / "run"),
        "model": {"source": str(encoder), "license": "mit", "head": "encoder"},
        "attention": {"preset": "augmented-encoder", "window_size": 4, "conv_taps": 4},
        "data": {"train": {"source": "builtin:train"}, "heldout": {"source": "builtin:heldout"}},
        "transfer": {"steps": 20, **TRAINING},
        "finetune": {"steps": 4, "targets": ["query", "value"], "next_token": 0, "distill": 1, **TRAINING},
        "evaluate": {"tokens": 384, "lengths": [48, 64], "copying": None},
        "export": {},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return directory / "run", converted(linearize, path, "--launch", "none"), path


def test_pieces_of_text_are_read_as_whole_ones(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    around = edges(tokenizer)
    whole = tokenizer("the of and the", return_tensors="pt")["input_ids"]
    assert around == ([whole[0, 0].item()], [whole[0, -1].item()])
    piece = torch.full_like(whole, 9)
    piece[:, 1:-1] = whole[:, 1:-1]
    assert torch.equal(framed(piece, around), whole) and (piece == 9).any()


def test_each_stages_model_is_measured_beside_its_teacher(run):
    directory, printed, _ = run
    results = state(directory, "evaluate")["metrics"]
    found = {name: figures["embedding"]["48"]["mean"] for name, figures in results["models"].items()}
    # Sums in another order.
    assert found.pop("teacher (softmax)") == pytest.approx(1, abs=1e-5)
    window, installed, transferred, finetuned = found.values()
    assert window < 1 - 1e-3 and installed == pytest.approx(window, abs=1e-4)
    assert len({installed, transferred, finetuned}) == 3
    assert results["ablations"]["local only"]["embedding"]["64"]["p5"] < 1 - 1e-3
    assert f"{finetuned:.3f}" in printed and "KV cache" not in printed
    losses = state(directory, "transfer")["metrics"]["loss"]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_hidden_states_come_closer_to_the_softmax_selfs(encoder):
    section = FinetuneSection(steps=1, lr=1e-2, targets=["query", "value"], next_token=0, distill=1)
    config = replace(PRESETS["augmented-encoder"], window_size=4, conv_taps=4)
    model = prepare_finetune(install(BertModel.from_pretrained(encoder), config), section).train()
    objective = HiddenStates(section, edges(AutoTokenizer.from_pretrained(encoder)))
    ids = torch.randint(4, 240, (2, 48), generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(objective.loss(model, {"input_ids": ids}, 1, 0))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    # The teacher is the softmax model whatever was learned.
    with softmax_self(model, ids.device, False) as teacher:
        expected = BertModel.from_pretrained(encoder).eval()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(teacher(input_ids=ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert model.get_base_model().config._attn_implementation == "linearize"


def test_the_export_is_the_model_that_was_measured(run, encoder):
    directory, _, _ = run
    path = directory / "export" / "model"
    model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    rows = torch.randint(4, 240, (3, 40), generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(
        embed(model, rows), embed(BertModel.from_pretrained(encoder).eval(), rows), dim=-1
    )
    assert ((cosine > 0.5) & (cosine < 1 - 1e-5)).all()
    card = (path / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card and "feature-extraction" in card and "cosine @64" in card
    assert "linearize chat" not in card and "generated token" not in card


def test_writing_verbs_say_what_it_is(linearize, run):
    result = linearize("chat", run[0], "--prompt", "the")
    assert result.code == 2 and "transformers' AutoModel loads it" in result.stderr


def test_a_finished_run_is_not_done_again(linearize, run):
    result = linearize("convert", run[2], "--launch", "none", "--resume")
    assert result.code == 0 and "done in" not in result.stdout


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["model.head=causal-lm", "finetune=null", "evaluate=null"], "model.head: BertLMHeadModel sees what is behind"),
        (["attention.preset=augmented"], "attention.state: delta depends on which key comes first"),
        (["transfer.length=65"], "transfer.length: 65 is longer than the 64 positions"),
        (["evaluate.lengths=[65]"], "evaluate.lengths: 65 tokens are more than the 64 positions"),
    ],
)
def test_what_is_refused_before_anything_is_done(linearize, run, tmp_path, changes, sentence):
    result = linearize("convert", run[2], *changes, "--out", tmp_path / "run")
    assert result.code == 2 and sentence in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("finetune.next_token=1", "finetune.next_token: an encoder sees the next token; learn from its softmax self"),
        ("finetune.chunk=16", "finetune.chunk: an encoder has no cache"),
        ("transfer.recall=0.5", "transfer.recall: repeats parts of a text to have them predicted; set it to 0.0"),
        ("keep.kv_budget=0.1", "keep.kv_budget: measures what is copied from far back"),
        ("evaluate.passkey=[32]", "evaluate.passkey: asks for next tokens"),
        ("medusa={steps: 1, lr: 1.0}", "medusa: heads guess next tokens, which an encoder does not make; leave it out"),
    ],
)
def test_what_a_recipe_cannot_ask_of_an_encoder(run, change, sentence):
    with pytest.raises(RecipeError, match=sentence.replace(".", r"\.")):
        load_recipe(str(run[2]), [change])
