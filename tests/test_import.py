"""Published checkpoints: the imported model computes the published formula, and what does not fit is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from linearize.convert import importing
from linearize.layers.config import PRESETS

from .published import (
    GROUP,
    HEADS,
    LAYERS,
    PEFT,
    TAPS,
    adapters,
    by_hand,
    linearized,
    linearized_by_hand,
    lolcats_by_hand,
    make_base,
    maps,
    normal,
    prefixed,
)
from .test_export import load_elsewhere

pytestmark = pytest.mark.usefixtures("without_gradients")

# Logits of single precision, of a few units: sums in other orders.
TOLERANCE = 1e-5
IDS = torch.randint(2, 250, (2, 331), generator=torch.Generator().manual_seed(0))
SMALL = ("--window-size", GROUP)


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> Path:
    return make_base(tiny_model, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def imported(linearize, base, tmp_path):
    """Runs the verb on checkpoints, {file name: content}, and returns the model and what was printed."""

    def run(checkpoints: dict, *options, base: Path = base):
        files = [put(tmp_path / name, content) for name, content in checkpoints.items()]
        result = linearize("import", *files, "--base", base, "--out", tmp_path / "out", *options)
        assert result.code == 0, result.stderr
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        return model.eval(), result.stdout

    return run


def put(path: Path, content) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def logits(model, ids=IDS):
    return model(ids).logits


def assert_same(model, expected):
    """Of whole windows, and of texts that end within one."""
    for length in (10, 4 * GROUP, 331):
        ids = IDS[:, :length]
        torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=TOLERANCE, atol=TOLERANCE)


DISTILLED, LORA = maps(), adapters()
# As training scripts save it, as it is on the Hub, and as other wrappers name it: all the same model.
LAYOUTS = {
    "two files": {
        "a_distill.pt": {"model_state_dict": prefixed(DISTILLED, "model."), "step": 100, "eval/loss": 0.5},
        "a_ft.pt": {"model_state_dict": prefixed(LORA, PEFT + "model."), "step": 200, "eval/loss": 1.5},
    },
    "on the Hub": {"model.pt": prefixed(DISTILLED, "model."), "ft.pt": prefixed(LORA, "model.")},
    "one file": {"ckpt_lora.pt": prefixed(DISTILLED | LORA, PEFT + "model.")},
    "maps finetuned, too": {
        "b_ft.pt": {"model_state_dict": prefixed(DISTILLED | LORA, PEFT + "model.")},
        "b_distill.pt": {"model_state_dict": prefixed(maps(seed=900), "model.")},
    },
    "data parallel and FSDP": {
        "c.pt": {"model": prefixed(DISTILLED, "module.model._fsdp_wrapped_module.")},
        "c.safetensors": prefixed(
            {name.replace(".default", ""): value for name, value in LORA.items()}, PEFT + "model."
        ),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lolcats(imported, base, layout):
    model, _ = imported(LAYOUTS[layout], *SMALL)
    expected = by_hand(base, lolcats_by_hand(DISTILLED, "terrace"), LORA)
    assert_same(model, expected)
    config = model.config.linear_attention
    assert config["window"] == "terrace" and config["key_maps"] == "query_head"
    # The test can fail: it is another model than the one before, and every part of it matters.
    for other in (
        AutoModelForCausalLM.from_pretrained(base),
        by_hand(base, lolcats_by_hand(DISTILLED, "terrace")),
        by_hand(base, lolcats_by_hand(DISTILLED, "sliding"), LORA),
        by_hand(base, lolcats_by_hand(maps(seed=900), "terrace"), LORA),
    ):
        assert (logits(model) - logits(other)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "weights", "window"),
    [
        ("x_lk_smd_wtk64_fd64_w01_distill.pt", {}, "terrace"),
        ("x_lk_smd_wsw16_fd64_w01_distill.pt", {}, "sliding"),
        ("x_lk_smd_fd64_distill.pt", {"window": False}, None),
        ("x_lk_t2r_distill.pt", {"window": False, "bias": True, "columns": 8}, None),
        ("x_lk_t2r_wtk64_distill.pt", {"bias": True, "columns": 8}, "terrace"),
    ],
)
def test_variants_of_lolcats(imported, base, name, weights, window):
    """Window and size are told by the file's name, maps by what is in it."""
    weights = maps(**weights)
    model, printed = imported({name: prefixed(weights, "model.")})
    size = 16 if "wsw16" in name else 64
    assert_same(model, by_hand(base, lolcats_by_hand(weights, window, size)))
    assert "left out: LoRA adapters" in printed


def test_presets_are_what_is_published(imported):
    model, _ = imported({"a_distill.pt": prefixed(DISTILLED, "model.")})
    lolcats = PRESETS["lolcats"].to_dict() | {"feature_dim": 8, "key_maps": "query_head"}
    assert model.config.linear_attention == lolcats


def test_a_map_for_both_q_and_k_is_saved_once(imported, base):
    tied = {name: value for name, value in DISTILLED.items() if "feature_map_k" not in name}
    both = tied | {name.replace("map_q", "map_k"): value for name, value in tied.items() if "map_q" in name}
    model, _ = imported({"tied.pt": tied}, *SMALL)
    assert_same(model, by_hand(base, lolcats_by_hand(both, "terrace")))


@pytest.mark.parametrize(("options", "scale"), [((), 2.0), (("--alpha", 2), 0.5)])
def test_alpha(imported, base, options, scale):
    model, _ = imported({"ft.pt": DISTILLED | LORA}, *SMALL, *options)
    assert_same(model, by_hand(base, lolcats_by_hand(DISTILLED, "terrace"), LORA, scale))


def test_without_groups_keys_have_maps_as_ever(imported, tiny_model, tmp_path):
    """So nothing is repeated."""
    base = make_base(tiny_model, tmp_path / "mha", kv_heads=HEADS)
    model, _ = imported({"a_distill.pt": DISTILLED}, *SMALL, base=base)
    assert model.config.linear_attention["key_maps"] == "key_head"
    assert_same(model, by_hand(base, lolcats_by_hand(DISTILLED, "terrace")))


def test_layers_that_stayed_softmax(imported, base):
    some = {name: value for name, value in DISTILLED.items() if "layers.0." in name}
    model, _ = imported({"hybrid.pt": some}, *SMALL, "--softmax-layer", 1)
    attend = lolcats_by_hand(DISTILLED, "terrace")

    def mixed(module, query, key, value, mask, **kwargs):
        if module.layer_idx == 0:
            return attend(module, query, key, value, mask, **kwargs)
        k, v = (x.repeat_interleave(2, dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=True).transpose(1, 2), None

    assert_same(model, by_hand(base, mixed))


def greedy(model, ids, count):
    """The text that a model writes which reads all of it anew for every token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("kind", ["lolcats", "linearized-llm"])
def test_generation_goes_on_as_the_formula(imported, base, kind):
    """Over many windows, from a prompt that ends within one; also with cache against without."""
    if kind == "lolcats":
        model, _ = imported({"a.pt": DISTILLED | LORA}, *SMALL)
        expected = by_hand(base, lolcats_by_hand(DISTILLED, "terrace"), LORA)
    else:
        weights = linearized()
        model, _ = imported({"a.pt": weights | LORA}, *SMALL)
        expected = by_hand(base, linearized_by_hand(weights), LORA)
    prompt, count = IDS[:, :37], 6 * GROUP + 5
    arguments = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    text = model.generate(prompt, **arguments, eos_token_id=None)
    assert torch.equal(text, greedy(expected, prompt, count))
    assert len({*text[0, 37:].tolist()}) > 5  # it is no single token over and over
    cache = model(text[:, :-1], use_cache=True).past_key_values
    last = model(text[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, logits(expected, text)[:, -1], rtol=TOLERANCE, atol=TOLERANCE)


# Linearized-LLM

EMBEDDINGS = {
    "embed_tokens.weight": normal(256, 32, seed=400),
    "norm.weight": normal(32, seed=401),
    **{f"layers.{layer}.input_layernorm.weight": normal(32, seed=402 + layer) for layer in range(LAYERS)},
}


def with_weights(model, weights):
    own = model.state_dict()
    for name, value in weights.items():
        own[f"model.{name}"].copy_(value)
    return model


@pytest.mark.parametrize(
    "parts", [{}, {"conv": False}, {"factor": False}], ids=["augmented", "factor alone", "conv alone"]
)
def test_linearized_llm(imported, base, parts):
    """Adapters beside what else was trained: factors, convolutions, embeddings and norms."""
    weights = linearized(**parts)
    trained = weights | EMBEDDINGS | {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    model, _ = imported(
        {"adapter_model.bin": prefixed(LORA, PEFT + "model."), "trained.bin": prefixed(trained, PEFT + "model.")},
        *SMALL,
    )
    assert_same(model, with_weights(by_hand(base, linearized_by_hand(weights), LORA), EMBEDDINGS))
    config = model.config.linear_attention
    assert (config["local"], config["conv_taps"]) == ("relu2", TAPS // 2 + 1 if parts.get("conv", True) else 0)
    assert (config["feature_map"] == "l2") == parts.get("factor", True)


def test_linearized_llm_as_a_whole_model(linearize, base, tmp_path):
    """As it is published: a directory in shards with all weights, adapters merged, which is its own base."""
    weights = linearized()
    whole = AutoModelForCausalLM.from_pretrained(base)
    with_weights(whole, EMBEDDINGS)
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    for file in base.glob("tokenizer*"):
        (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    content = {**whole.state_dict(), **prefixed(weights, "model.")}
    names = sorted(content)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: content[name] for name in part}, tmp_path / "whole" / file)
        content |= {name: file for name in part}
    index = {"metadata": {}, "weight_map": content}
    (tmp_path / "whole" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "whole" / "training_args.bin").write_bytes(b"no weights")
    result = linearize("import", tmp_path / "whole", "--base", tmp_path / "whole", "--out", tmp_path / "out", *SMALL)
    assert result.code == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert_same(model, with_weights(by_hand(base, linearized_by_hand(weights)), EMBEDDINGS))


def test_linearized_llm_without_factors_and_convolution(imported, base):
    """Which its names do not tell."""
    model, _ = imported({"adapter_model.bin": prefixed(LORA, PEFT + "model.")}, "--format", "linearized-llm", *SMALL)
    assert_same(model, by_hand(base, linearized_by_hand({}), LORA))


# What is written


def test_an_imported_model_is_an_exported_one(linearize, imported, tmp_path, base):
    """It loads by itself, says where it comes from, and all verbs take it."""
    model, printed = imported({"x_distill.pt": DISTILLED, "x_ft.pt": LORA}, *SMALL)
    out = tmp_path / "out"
    assert printed.strip() == str(out)
    card = (out / "README.md").read_text()
    for line in (
        "LoLCATs ([arXiv 2410.10254](https://arxiv.org/abs/2410.10254))", "- base: llama", "- x_distill.pt",
        "LoRA adapters of rank 4 are merged with alpha twice the rank", "  window: terrace",
    ):  # fmt: skip
        assert line in card
    assert str(tmp_path) not in card
    load_elsewhere(
        out,
        f"""
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
torch.save(model(torch.arange(1, 101).view(1, -1)).logits.detach(), {str(tmp_path / "logits.pt")!r})
""",
    )
    expected = logits(model, torch.arange(1, 101).view(1, -1))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=TOLERANCE, atol=TOLERANCE)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the and of"}\n')
    for arguments in (
        ("chat", out, "--prompt", "the and of", "--max-new-tokens", 8),
        ("generate", out, "--prompts", prompts, "--max-new-tokens", 8),
        ("bench", out, "--prompts", prompts, "--max-new-tokens", 8),
        ("evaluate", out, "--tokens", 256, "--lengths", 128, "--copying", 0, "--json"),
    ):
        result = linearize(*arguments)
        assert result.code == 0, result.stderr
    measured = json.loads(result.stdout)
    assert len(measured["ablations"]) > 1


def test_checkpoints_of_the_hub(linearize, base, tmp_path, monkeypatch):
    """What is not a path is asked for there."""
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        directory = tmp_path / name.replace("/", "+")
        directory.mkdir()
        put(directory / "model.pt", prefixed(DISTILLED if "distill" in name else LORA, "model."))
        return str(directory)

    monkeypatch.setattr(importing, "snapshot_download", download)
    names = ["hazyresearch/lolcats-llama-3.1-8b-distill", "hazyresearch/lolcats-llama-3.1-8b-ft-lora"]
    result = linearize("import", *names, "--base", base, "--out", tmp_path / "out")
    assert result.code == 0, result.stderr
    assert asked == names
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- {name}\n" in card for name in names)


# What is refused


@pytest.fixture
def refused(linearize, base, tmp_path, monkeypatch):
    """Runs the verb and returns the one line that it is refused with; no weights of the base are read."""

    def no_weights(*arguments, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("linearize.convert.sources.load_model", no_weights)

    def run(*contents, options=(), base=base, out=tmp_path / "out") -> str:
        files = [put(tmp_path / f"{i}.pt", content) for i, content in enumerate(contents)]
        before = {*tmp_path.rglob("*")}
        result = linearize("import", *files, "--base", base, "--out", out, *options)
        assert result.code == 2 and {*tmp_path.rglob("*")} == before
        (line,) = result.stderr.splitlines()
        assert line.startswith("linearize: ")
        return line.removeprefix("linearize: ")

    return run


def changed(name: str, value) -> dict:
    """The distilled weights with one of them changed or (None) left out."""
    content = DISTILLED | {name: value}
    return {name: value for name, value in content.items() if value is not None}


ZERO = torch.zeros(1)
MAP = "layers.1.self_attn.feature_map_q.mlp.layer"


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ([DISTILLED | {"layers.0.self_attn.magic": ZERO}], "0.pt: layers.0.self_attn.magic: expected LoLCATs'"),
        ([{"0.0.linear.weight": torch.zeros(32, 32)}], "0.pt: 0.0.linear.weight: expected LoLCATs'"),
        ([DISTILLED | {"layers.0.self_attn.feature_map_q.mlp.layer0": ZERO}], "mlp.layer0: expected LoLCATs'"),
        ([changed(MAP, torch.zeros(4, 16, 4))], f"0.pt: {MAP} is [4, 16, 4], but .*llama needs [4, 8, any]"),
        ([changed(MAP, torch.zeros(4, 8, 6))], "mlp.layer is [4, 8, 6] in layer 1, but [4, 8, 4] in layer 0"),
        ([changed("layers.1.self_attn.window_factors", torch.zeros(1, 2, 1, 1))], "needs [1, 4, 1, 1]"),
        ([changed(MAP, None)], "layer 1 of .*llama has no feature_map_q.mlp.layer, but layers beside it; if it"),
        ([DISTILLED | {"layers.2.self_attn.window_factors": ZERO}], "llama has layers 0 to 1; name the base"),
        ([LORA], "0.pt: holds adapters, but no feature maps: name LoLCATs' distill checkpoint"),
        ([{"norm.weight": torch.zeros(32)}], "0.pt: holds weights of the base alone"),
        ([DISTILLED, DISTILLED], "0.pt and .*1.pt both hold layers.0"),
        ([DISTILLED, LORA, LORA], "1.pt and .*2.pt both hold layers.0"),
        ([DISTILLED | linearized()], "layers.0.self_attn.global_factor: LoLCATs saves feature_map_q"),
        ([DISTILLED | adapters(kv_heads=4)], "k_proj.lora_B.default.weight is [32, 4], but .*llama needs [16, 4]"),
        ([DISTILLED | {name: x for name, x in LORA.items() if "lora_B" not in name}], "half of an adapter; lora_B is"),
        ([{name: x for name, x in DISTILLED.items() if "window" in name}], "but no feature_map_q.mlp.layer; name all"),
        ([{}], "0.pt: holds no weights by name"),
        ([[1, 2]], "0.pt: holds no weights by name"),
        ([PRESETS["lolcats"]], "0.pt: is no checkpoint that holds tensors alone, and nothing else is unpickled"),
        ([linearized() | {"layers.0.self_attn.local_factor": ZERO}], "local_factor: expected LoLCATs'"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(refused, contents, sentence):
    line = refused(*contents)
    position = 0
    for part in sentence.split(".*"):
        position = line.index(part, position)


def test_files_that_are_none(refused, tmp_path):
    assert refused(options=[tmp_path / "nowhere.pt"]) == f"{tmp_path}/nowhere.pt: no such file"
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt: is no checkpoint" in refused(options=[tmp_path / "text.pt"])
    (tmp_path / "empty").mkdir()
    assert "empty: holds no checkpoint (*.safetensors" in refused(options=[tmp_path / "empty"])


def test_bases_that_do_not_fit(refused, tmp_path):
    assert "cannot use" in refused(DISTILLED, base=tmp_path / "nowhere")
    gpt2 = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4)).save_pretrained(gpt2)
    line = refused(DISTILLED, base=gpt2)
    assert line.startswith(f"--base: {gpt2} is a GPT2LMHeadModel, which has no model.layers.0.self_attn.q_proj.weight")
    t5 = tmp_path / "t5"
    AutoConfig.for_model("t5").save_pretrained(t5)
    line = refused(DISTILLED, base=t5)
    assert line.startswith("--base: ") and "T5Config" in line


def test_damaged_bases(refused, base, tmp_path):
    for name, damage, sentence in [
        ("untold", lambda directory: (directory / "tokenizer.json").unlink(), "--base: no tokenizer at "),
        ("lost", lambda directory: (directory / "model.safetensors").unlink(), "holds no weights (*.safetensors)"),
        ("cut", lambda directory: cut(directory / "model.safetensors"), "model.safetensors is not a whole safetensors"),
    ]:
        directory = tmp_path / name
        shutil.copytree(base, directory)
        damage(directory)
        assert sentence in refused(DISTILLED, base=directory)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def test_out_that_is_there(refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    line = refused(DISTILLED, out=tmp_path / "full")
    assert line == f"{tmp_path}/full: is there already; name an empty directory by --out, or remove it"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format", "loldogs"], "--format loldogs: expected lolcats or linearized-llm"),
        (["--window", "bay"], "--window bay: expected terrace or sliding"),
        (["--softmax-layer", 7], "softmax layers: some of layers 0 to 1"),
        (["--softmax-layer", 1], "layer 1 has feature_map_q.mlp.layer, so it did not stay softmax"),
        (["--format", "linearized-llm"], "Linearized-LLM saves dwconv.weight"),
    ],
)
def test_options_that_do_not_fit(refused, options, sentence):
    assert sentence in refused(DISTILLED, options=options)
