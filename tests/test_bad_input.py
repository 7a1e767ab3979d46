"""Bad input: one sentence with its place on stderr, exit code 2, before weights are read or anything is written."""

import importlib.util
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaModel

from linearize.recipes.loader import shipped_recipes


@pytest.fixture
def refused(linearize, recipe, tmp_path, monkeypatch):
    """Runs convert on a recipe with changed sections and returns the one line that it is refused with."""

    def no_weights(*arguments, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("linearize.convert.sources.load_model", no_weights)

    def run(*overrides, **changes) -> str:
        path = recipe(**changes)
        results = [linearize("convert", path, *overrides), linearize("check", path, *overrides)]
        # What `convert` refuses, `check` refuses with the same words.
        assert [result.code for result in results] == [2, 2]
        assert results[0].stderr == results[1].stderr
        (line,) = results[0].stderr.splitlines()
        assert not (tmp_path / "run").exists()
        return line

    return run


def line_of(path, text: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_unknown_field(refused, tmp_path):
    line = refused(attention={"preset": "augmented", "feature_dimm": 8})
    number = line_of(tmp_path / "recipe.yaml", "feature_dimm")
    assert line.startswith("linearize: ")
    assert f"recipe.yaml:{number}: attention.feature_dimm: unknown field, did you mean feature_dim?" in line


def test_wrong_type(refused, tmp_path):
    line = refused(attention={"window_size": "many"})
    number = line_of(tmp_path / "recipe.yaml", "window_size")
    assert f"recipe.yaml:{number}: attention.window_size: expected a whole number, got 'many'" in line


@pytest.mark.parametrize(
    ("field", "value"), [("feature_dim", 0), ("window_size", 0), ("sinks", 65), ("feature_dim", 7), ("conv_taps", -1)]
)
def test_attention_that_cannot_be(refused, field, value):
    assert f"attention.{field}: " in refused(attention={field: value})


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "blank.txt", "short.txt"])
def test_data(refused, tmp_path, name):
    content = {"empty.txt": "", "blank.txt": " \n\n", "short.txt": "only three words"}
    path = tmp_path / name
    if name in content:
        path.write_text(content[name])
    line = refused(data={"train": {"source": str(path)}, "heldout": {"source": "builtin:heldout"}})
    reason = {
        "missing.txt": "no such file",
        "empty.txt": "empty",
        "blank.txt": "has no documents",
        "short.txt": "tokens, but one sequence needs 64",
    }[name]
    assert "data.train" in line and reason in line and str(path) in line


def test_every_source_is_looked_at(refused, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    sources = [{"source": "builtin:train"}, {"source": str(tmp_path / "blank.txt")}]
    assert "blank.txt has no documents" in refused(data={"train": sources, "heldout": {"source": "builtin:heldout"}})


def test_data_without_the_field(refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a"}\n')
    line = refused(data={"train": {"source": str(path)}, "heldout": {"source": "builtin:heldout"}})
    assert "has no field 'text'; its fields are question" in line


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("bloom", "model.source: BloomForCausalLM cannot be linearized: BloomAttention"),
        ("bert", "model.head: BertLMHeadModel sees what is behind a token, so it is not a causal language model"),
    ],
)
def test_unsupported_architecture(refused, tiny_model, tmp_path, family, sentence):
    model = tmp_path / family
    shutil.copytree(tiny_model, model)
    for file in model.glob("*.safetensors"):
        file.unlink()
    AutoConfig.for_model(family, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, n_head=4).save_pretrained(
        model
    )
    assert sentence in refused(model={"source": str(model)})


def test_model_that_is_no_language_model(refused, tiny_model, tmp_path):
    model = tmp_path / "t5"
    shutil.copytree(tiny_model, model)
    AutoConfig.for_model("t5").save_pretrained(model)
    assert "model.source: T5Config is not the configuration of a causal language model" in refused(
        model={"source": str(model)}
    )


@pytest.mark.parametrize("source", ["./nowhere", "package:not_a_package/x.gguf", "nowhere.gguf"])
def test_missing_model(refused, source):
    assert "model.source: " in refused(model={"source": source})


def test_corrupt_safetensors(refused, tiny_model, tmp_path):
    model = tmp_path / "broken"
    shutil.copytree(tiny_model, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refused(model={"source": str(model)})
    assert "model.source" in line and "model.safetensors is not a whole safetensors file" in line


def test_tokenizer_larger_than_the_embedding(refused, tiny_model, tmp_path):
    model = tmp_path / "small"
    shutil.copytree(tiny_model, model)
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = 100
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    line = refused(model={"source": str(model)})
    assert "model.tokenizer: tokenizer has 244 tokens but the model's embedding has 100 rows" in line


@pytest.fixture
def table_model(tiny_model, tmp_path):
    """A model whose positions are a table, which ends; rotations go on for ever."""
    path = tmp_path / "gpt2"
    shutil.copytree(tiny_model, path)
    vocabulary = AutoConfig.from_pretrained(tiny_model).vocab_size
    config = GPT2Config(vocab_size=vocabulary, n_positions=512, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_lengths_beyond_the_model(linearize, refused, tiny_model, table_model):
    assert "transfer.length: 1024 is longer than the 512 positions" in refused("transfer.length=1024")
    assert "evaluate.recall: 64 pairs need 128 words of one token" in refused("evaluate.recall=[64]")
    for change, reason in (
        ("lengths=[1024]", "lengths: 1024 tokens are more than the 512 pos"),
        ("copying={texts: 1}", "copying: 1024 tokens are more than the 512 pos"),
        ("passkey=[600]", "passkey: 600 tokens are more than the 512 pos"),
    ):
        line = refused("evaluate.tokens=2048", f"evaluate.{change}", model={"source": str(table_model)}, finetune=None)
        assert f"evaluate.{reason}" in line
    options = ("--copying", 0, "--lengths", 1024, "--tokens", 1024)
    assert linearize("evaluate", tiny_model, *options).code == 0
    result = linearize("evaluate", table_model, *options)
    assert result.code == 2
    assert result.stderr.startswith("linearize: --lengths: 1024 tokens are more than the 512 positions")


def test_lengths_that_finetuning_cannot_add(refused, tiny_model, table_model, tmp_path):
    longer = ("finetune.length=1024", "finetune.batch_size=1")
    table = refused(*longer, model={"source": str(table_model)})
    assert "finetune.length: 1024 is longer than the 512 positions that the model has, which are a table" in table
    assert "finetune.distill: the teacher knows 512 positions, not the 1024" in refused(*longer, "finetune.distill=1")
    assert "medusa.length: 1024 is longer than the 512 positions" in refused("medusa.length=1024")
    # Its angles at all positions depend on how many the configuration says that there are.
    dynamic = tmp_path / "dynamic"
    shutil.copytree(tiny_model, dynamic)
    config = json.loads((dynamic / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (dynamic / "config.json").write_text(json.dumps(config))
    line = refused(*longer, model={"source": str(dynamic)})
    assert "1024 is longer than the 512 positions that its rotary embedding (dynamic) is made for" in line


def test_phases_beyond_the_model(refused):
    line = refused("transfer.curriculum=[{length: 1024, share: 1.0}]", "transfer.batch_size=16")
    assert "transfer.curriculum: 1024 is longer than the 512 positions" in line


def test_offset_of_positions_that_sinks_rely_on(refused):
    line = refused("finetune.position_offset=10")
    assert "finetune" in line and "position_offset: 10 moves the sinks" in line and "sink_distance: null" in line


def test_positions_beyond_the_model(refused):
    line = refused("finetune.position_offset=449", "attention.sink_distance=null")
    assert "finetune.position_offset: 449 and a length of 64 are more than the 512 positions" in line


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("{0-2: {lr: 1.0}}", "0-2 is not among this model's attention layers, which are 0 to 1"),
        ("{0-1: {steps: 3}}", "every layer stops by step 3, so 6 steps are too many"),
    ],
)
def test_layers_that_do_not_fit_the_model(refused, layers, expected):
    assert f"transfer.layers: {expected}" in refused(f"transfer.layers={layers}")


def test_nothing_to_train(refused):
    assert "transfer: attention preset swa has nothing to train; set transfer: null" in refused(
        attention={"preset": "swa"}
    )


def test_adapters_for_modules_that_are_not_there(refused):
    line = refused("finetune.targets=[q_proj, query]")
    assert "finetune.targets: this model has no module named query; it has" in line and "v_proj" in line


def test_deepspeed_that_is_not_installed(linearize, recipe, refused, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    found = lambda name, *rest: None if name == "deepspeed" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", found)
    (tmp_path / "zero2.json").write_text("{}")
    for stage in ("finetune", "medusa"):
        line = refused(f"{stage}.deepspeed={tmp_path}/zero2.json")
        assert f"{stage}.deepspeed: deepspeed is not installed" in line
    # How many processes there are to be, `check` does not know.
    result = linearize("check", recipe(), "transfer.teacher=zero3")
    assert result.code == 2 and "transfer.teacher: deepspeed is not installed" in result.stderr


def test_a_model_without_blocks(refused, monkeypatch):
    made = LlamaModel.__init__

    def make(self, config):
        made(self, config)
        self.layers = nn.Sequential(*self.layers)

    monkeypatch.setattr(LlamaModel, "__init__", make)
    assert "has no list of decoder blocks; use transfer.blocks_at_once: null" in refused("transfer.blocks_at_once=1")


def test_learning_rates_that_deepspeed_does_not_know(refused, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    found = lambda name, *rest: real("torch" if name == "deepspeed" else name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", found)
    (tmp_path / "zero2.json").write_text('{"optimizer": {"type": "AdamW"}}')
    line = refused(f"finetune.deepspeed={tmp_path}/zero2.json", "finetune.attention_lr=1e-3")
    assert "finetune.attention_lr: the DeepSpeed configuration has an optimizer of its own" in line


@pytest.mark.parametrize("stage", ["finetune", "medusa"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_deepspeed_that_rounds_what_is_trained(refused, tmp_path, monkeypatch, stage, precision):
    real = importlib.util.find_spec
    found = lambda name, *rest: real("torch" if name == "deepspeed" else name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", found)
    (tmp_path / "zero2.json").write_text(json.dumps({precision: {"enabled": True}}))
    line = refused(f"{stage}.deepspeed={tmp_path}/zero2.json")
    assert f"{stage}.deepspeed: {precision}.enabled rounds what is trained; leave it out, and let {stage}.bf16" in line


def test_override_that_is_wrong(refused):
    assert "command line: transfer.stepss: unknown field, did you mean steps?" in refused("transfer.stepss=3")


def test_all_problems_at_once(linearize, recipe):
    path = recipe(attention={"window_size": "many", "feature_dimm": 1}, finetune={"steps": -1})
    result = linearize("check", path)
    assert result.code == 2 and len(result.stderr.splitlines()) == 3


@pytest.mark.parametrize("arguments", [("--only", "nothing"), ("--from", "nothing"), ("--only", "medusa")])
def test_stages_that_there_are_not(linearize, recipe, arguments):
    result = linearize("convert", recipe(medusa=None), *arguments)
    assert result.code == 2
    assert f"{arguments[0]} {arguments[1]}: this stage" in result.stderr
    assert "its stages are load, install, transfer" in result.stderr


def test_only_and_from_together(linearize, recipe):
    result = linearize("convert", recipe(), "--only", "load", "--from", "load")
    assert result.code == 2 and "give one of them, not both" in result.stderr


def test_somebody_elses_directory(linearize, recipe, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    result = linearize("convert", recipe(), "--out", precious)
    assert result.code == 2 and "is not empty and holds no run of linearize" in result.stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("verb", ["chat", "evaluate"])
def test_no_model_there(linearize, tmp_path, verb):
    result = linearize(verb, tmp_path)
    assert result.code == 2 and "holds no exported model" in result.stderr


def test_unknown_recipe(linearize):
    result = linearize("check", "demoo")
    message = f"demoo: no such file, and no shipped recipe of that name ({', '.join(shipped_recipes())})"
    assert result.code == 2 and message in result.stderr


def test_a_converted_model_is_not_converted_again(refused, tiny_model, tmp_path):
    from linearize.hub.export import export_model
    from linearize.layers.config import PRESETS
    from linearize.layers.seam import install

    export_model(install(AutoModelForCausalLM.from_pretrained(tiny_model), PRESETS["swa"]), tmp_path / "linear")
    assert "is linearized already" in refused(model={"source": str(tmp_path / "linear")})


def test_a_softmax_model_is_nothing_to_chat_with(linearize, tiny_model):
    result = linearize("chat", tiny_model)
    assert result.code == 2 and "is not a linearized model" in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--lengths", 9000], "--lengths: 9000 tokens are more than the 8192 to measure on"),
        (["--lengths", 64, "--recall", 200], "--recall: 200 pairs need 400 words of one token, the held-out text has"),
        (["--lengths", 64, "--passkey", 10], "--passkey: 10 tokens do not hold the "),
        (["--data", "nowhere.txt"], "--data nowhere.txt: "),
    ],
)
def test_evaluate_what_cannot_be(linearize, tiny_model, options, expected):
    result = linearize("evaluate", tiny_model, "--copying", 0, *options)
    assert result.code == 2 and result.stderr.startswith(f"linearize: {expected}")


@pytest.mark.parametrize("content", ['{"text": "a"}\n{"text": ', "\udcff"])
def test_data_that_cannot_be_read(refused, tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    line = refused(data={"train": {"source": str(path)}, "heldout": {"source": "builtin:heldout"}})
    assert f"data.train: {path}: " in line


def test_data_of_a_kind_that_is_not_read(refused, tmp_path):
    (tmp_path / "rows.arrow").write_text("a,b")
    line = refused(data={"train": {"source": str(tmp_path / "rows.arrow")}, "heldout": {"source": "builtin:heldout"}})
    assert "data.train.source: files of this kind are not read" in line


def test_data_that_are_too_few_for_the_heads(refused, tmp_path):
    (tmp_path / "few.txt").write_text("the " * 40)
    few = {"train": {"source": "builtin:train"}, "heldout": {"source": str(tmp_path / "few.txt")}}
    assert "data.heldout: " in refused(data=few, evaluate=None)


def test_distillation_needs_a_teacher(refused):
    assert "finetune.distill: the teacher is the model without its adapters" in refused(
        "finetune.method=full", "finetune.distill=1.0"
    )


def test_missing_weight_files(refused, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").unlink()
    assert "holds no weights" in refused(model={"source": str(model)})
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors is missing" in refused(model={"source": str(model)})


def test_missing_weights_stop_the_run(linearize, recipe, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = linearize("convert", recipe(model={"source": str(model)}))
    assert result.code == 2 and "no fitting weights for model.layers.1.mlp.up_proj.weight" in result.stderr


@pytest.mark.parametrize(("stage", "steps"), [("transfer", "transfer.steps=4"), ("finetune", "transfer=null")])
def test_training_that_diverges_stops_the_run(linearize, recipe, tmp_path, stage, steps):
    result = linearize("convert", recipe(), steps, f"{stage}.lr=1e30", f"{stage}.warmup_steps=0")
    assert result.code == 2
    assert f"{stage}: the loss of step " in result.stderr and "use a smaller lr (1e+30 now)" in result.stderr
    assert json.loads((tmp_path / "run" / stage / "state.json").read_text())["status"] == "running"


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ({}, "keep: give one of kv_budget, layers and heads, not none"),
        ({"kv_budget": 0.1, "layers": [0]}, "keep: give one of kv_budget, layers and heads, not kv_budget and layers"),
        ({"kv_budget": 1.0}, "keep.kv_budget: expected less than 1, got 1.0"),
        ({"kv_budget": 0.2}, "keep.kv_budget: 0.2 of the model's 4 key heads is not one head; use 0.25 or more"),
        ({"kv_budget": 0.5}, "keep.length: 512 tokens twice are longer than the 512 positions of the model"),
        ({"kv_budget": 0.5, "length": 16}, "keep.length: a text of 16 tokens is repeated within the window"),
        ({"layers": [2]}, "keep.layers: the model has no attention layer 2; it has 0, 1"),
        ({"layers": [1, 0]}, "keep.layers: these are all of the model's heads, so nothing is left to linearize"),
        ({"heads": {"one": [0]}}, "keep.heads: the model has no attention layer one"),
        ({"heads": {"1": [0, 2]}}, "keep.heads: layer 1 has no key head 2; its heads are 0 to 1"),
        ({"heads": {"1": [-1]}}, "keep.heads.1.0: expected 0 or more, got -1"),
        ({"heads": [1]}, "keep.heads: expected a section with fields, got a list"),
    ],
)
def test_heads_that_cannot_be_kept(refused, keep, reason):
    assert reason in refused(keep=keep)


def test_a_window_of_kept_heads_that_cannot_be(refused):
    assert "attention.kept_window is for heads that are kept" in refused("attention.kept_window=64")
    line = refused("attention.kept_window=1", keep={"layers": [0]})
    assert "attention.kept_window: 1 tokens are too few; use 2 or more" in line
