"""A tiny Llama with a tokenizer, on disk, and recipes for it."""

import contextlib
import io
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Before transformers is imported: nothing is looked for on the Hub, and copied model code does not stay.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="linearize-modules-")

# Before torch is imported, and for the processes that tests start: the suite runs in parallel, and threads of several
# processes that wait for each other take a hundred times as long.
os.environ["OMP_NUM_THREADS"] = "1"
# Products of matrices have the same bits wherever in memory the matrices lie.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

import pytest
import torch

if not torch.cuda.is_available():
    # Before a kernel is defined: its arithmetic is tested all the same.
    os.environ["TRITON_INTERPRET"] = "1"

import yaml
from huggingface_hub import constants
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.recipes.corpora import BUILTIN_DATA

from .hub_server import Hub
from .ranks import Ranks

# How long an example takes depends on what else the machine does.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

MINIMAL_RECIPE = """\
output: runs/test
model:
  source: some/model
data:
  train: {source: builtin:train}
  heldout: {source: builtin:heldout}
"""
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A directory with a random two-layer Llama whose tokenizer knows the commonest words of the shipped text."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    words = Counter(BUILTIN_DATA["builtin:train"].read_text("utf-8").split())
    vocabulary = ["<unk>", "<eos>", "user", "assistant", *(word for word, _ in words.most_common(240))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def exported(tiny_model, tmp_path_factory) -> Path:
    """An exported directory of the tiny model, which nobody has trained: see `exports.export_tiny`."""
    from .exports import export_tiny

    return export_tiny(tiny_model, tmp_path_factory.mktemp("exported") / "model")


@dataclass
class Result:
    """What a run of the command line came to."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def linearize():
    """Runs the command line in this process: `linearize("check", path)`; anything but an exit is raised."""
    from linearize import cli

    os.environ["COLUMNS"] = "140"

    def run(*arguments) -> Result:
        out, err = io.StringIO(), io.StringIO()
        before, sys.argv = sys.argv, ["linearize", *map(str, arguments)]
        code = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as error:
            code = error.code or 0
        finally:
            sys.argv = before
        return Result(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Starts several processes of the command line as one run."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def finished(linearize, tiny_model, tmp_path_factory):
    """A finished run: (its directory, what convert printed, its recipe)."""
    directory = tmp_path_factory.mktemp("finished")
    training = "{steps: 6, batch_size: 2, length: 64, save_every: 2, lr: 0.01"
    recipe = directory / "recipe.yaml"
    recipe.write_text(f"""\
name: tiny
output: {directory / "run"}
model: {{source: {tiny_model}, license: mit, base_model: somebody/tiny}}
attention: {{preset: augmented, window_size: 16, sinks: 2, conv_taps: 4, slack: 8}}
data: {{train: {{source: "builtin:train"}}, heldout: {{source: "builtin:heldout"}}}}
transfer: {training}, micro_batch_size: 1}}
finetune: {training}, distill: 0.5}}
medusa: {training}, heads: 2}}
evaluate: {{tokens: 256, lengths: [64, 128], copying: {{texts: 2, length: 32}}, passkey: [100], recall: [4]}}
export: {{}}
""")
    result = linearize("convert", recipe)
    assert result.code == 0, result.stderr
    return directory / "run", result.stdout, recipe


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """Writes a recipe for the tiny model and returns its path; `changes` replace or (None) drop whole sections."""

    def write(**changes) -> Path:
        training = {"batch_size": 2, "length": 64, "save_every": 2}
        content = {
            "name": "tiny",
            "output": str(tmp_path / "run"),
            "model": {"source": str(tiny_model), "license": "mit", "base_model": "somebody/tiny"},
            "attention": {"preset": "augmented", "window_size": 16, "sinks": 2, "conv_taps": 4, "slack": 8},
            "data": {"train": {"source": "builtin:train"}, "heldout": {"source": "builtin:heldout"}},
            "transfer": {"steps": 6, "lr": 1e-2, **training},
            "finetune": {"steps": 6, "lr": 1e-2, **training},
            "medusa": {"steps": 4, "heads": 2, "lr": 1e-2, **training},
            "evaluate": {"tokens": 256, "lengths": [128], "copying": {"texts": 2, "length": 32}},
            "export": {},
        }
        content = {key: value for key, value in (content | changes).items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Writes recipe.yaml into an empty working directory: MINIMAL_RECIPE (6 lines) and what a test adds."""
    monkeypatch.chdir(tmp_path)

    def write(addition: str = "", base: str = MINIMAL_RECIPE) -> str:
        Path("recipe.yaml").write_text(base + addition, "utf-8")
        return "recipe.yaml"

    return write


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package `tiny_model` with one file, that fails when it is imported."""
    folder = tmp_path / "site" / "tiny_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub that this process talks to, with a token for what is somebody's."""
    with Hub() as hub:
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        yield hub
