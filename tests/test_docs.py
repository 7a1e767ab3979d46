"""Every command of README.md and docs/ runs, in the order of its page, where the model that it names is a tiny one.

A recipe that a page writes keeps its stages and gets few steps; blocks that begin with `# part of mine.yaml` are put
into it. Of commands that install or set up, what they name is looked up.
"""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import linearize as package
from linearize.recipes.loader import load_recipe

from . import published
from .conftest import Result

ROOT = Path(package.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
TRAINING = {"steps": 2, "batch_size": 2, "micro_batch_size": 1, "length": 64}
SMALL = {
    "attention": {"preset": "augmented", "window_size": 16, "sinks": 2, "conv_taps": 4, "slack": 8},
    "data": {"train": {"source": "builtin:train"}, "heldout": {"source": "builtin:heldout"}},
    "transfer": TRAINING,
    "finetune": TRAINING,
    "evaluate": {
        **{"tokens": 256, "lengths": [64], "passkey": [], "recall": [], "speed": [128]},
        "copying": {"texts": 2, "length": 32},
    },
}
TASKS = {
    "piqa": {"query": "the river", "choices": ["was", "of the"], "gold": 0},
    "winogrande": {"context_options": ["the man", "the house"], "continuation": "was in it", "gold": 1},
}
# Where a page's variables are for its reader to set.
VARIABLES = {"$NODES": "1", "$HEAD": "localhost"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each."""
    found = []
    for indent, language, text in BLOCK.findall(page.read_text("utf-8")):
        found.append((language, "\n".join(line.removeprefix(indent) for line in text.splitlines())))
    return found


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with ten key heads, of which one is a tenth."""
    directory = tmp_path_factory.mktemp("docs") / "model"
    config = LlamaConfig.from_pretrained(tiny_model, hidden_size=80, num_attention_heads=10, num_key_value_heads=5)
    config.max_position_embeddings = 2048
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


class Reader:
    """Somebody who types what a page says into an empty directory that holds models and texts of these names."""

    def __init__(self, directory: Path, linearize, ranks, model: Path, tiny_model: Path, finished: Path):
        self.directory, self.linearize, self.ranks = directory, linearize, ranks
        (directory / "meta-llama").mkdir()
        (directory / "meta-llama" / "Llama-3.2-1B").symlink_to(model)
        (directory / "meta-llama" / "Llama-3.1-8B").symlink_to(tiny_model)
        torch.save(published.maps(), directory / "lolcats-distill.pt")
        torch.save(published.prefixed(published.adapters(), published.PEFT + "model."), directory / "lolcats-ft.pt")
        (directory / "runs").mkdir()
        (directory / "runs" / "demo").symlink_to(finished)
        (directory / "notes.txt").write_text("What is written here is about rivers .\n" * 9, "utf-8")
        (directory / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "Which ?"}]}\n', "utf-8")
        (directory / "tasks").mkdir()
        for name, row in TASKS.items():
            (directory / "tasks" / f"{name}.jsonl").write_text(json.dumps(row), "utf-8")
        self.type("linearize recipes lora > mine.yaml")

    def type(self, line: str) -> None:
        for name, value in VARIABLES.items():
            line = line.replace(name, value)
        words = shlex.split(line, comments=True)
        if words[0] == "linearize":
            arguments, target = (words[1:-2], words[-1]) if ">" in words else (words[1:], None)
            if arguments[0] == "convert" and not {"--resume", "--from"} & {*arguments}:
                # One of the ways that the page shows, not what comes after the one before.
                shutil.rmtree("runs/lora", ignore_errors=True)
            if "--gpus" in arguments and "--launch" not in arguments:
                # By processes that start at once: what starts them else is tested by tests/test_processes.py.
                place = arguments.index("--gpus")
                count = int(arguments.pop(place + 1))
                del arguments[place]
                result = Result(0, self.ranks.finish(count, *arguments), "")
            else:
                result = self.linearize(*arguments)
            if target is not None:
                (self.directory / target).write_text(result.stdout, "utf-8")
                self.make_small(target)
        elif words[0] == "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run"]
            done = subprocess.run([*torchrun, *words[1:]], capture_output=True, text=True)
            result = Result(done.returncode, done.stdout, done.stderr)
        elif words[0] in ("transformers", "lm_eval"):
            # Run by tests/test_serving.py and tests/test_lm_eval.py: they wait for requests, or take minutes to start.
            missing = [word for word in words if word.startswith("runs/") and not (self.directory / word).is_dir()]
            result = Result(len(missing), "", "")
        elif words[:2] == ["hf", "download"]:
            (self.directory / words[4]).symlink_to(self.directory / words[2])
            result = Result(0, "", "")
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text("utf-8")
            result = Result(*(int(f"\n{words[1]}:" not in makefile), "", "no such target"))
        elif words[:2] == ["pip", "install"]:
            assert words[2:4] == ["-c", "constraints.txt"], "or a newcomer gets versions that nobody has tried"
            extras = set(re.findall(r"[\w-]+", words[4].partition("[")[2]))
            known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
            result = Result(int(not extras <= known.keys()), "", f"no such extra: {extras - known.keys()}")
        else:
            raise AssertionError(f"nobody has said how to run this: {line}")
        assert result.code == 0, (line, result.stderr)

    def make_small(self, recipe: str) -> None:
        content = yaml.safe_load((self.directory / recipe).read_text("utf-8"))
        for section, small in SMALL.items():
            if content.get(section):
                content[section] |= small
        if content["model"].get("config"):
            content["model"]["tokenizer"] = "meta-llama/Llama-3.2-1B"
        (self.directory / recipe).write_text(yaml.safe_dump(content), "utf-8")

    def put(self, part: str) -> None:
        """A part of the recipe is one that a recipe may have."""
        content = yaml.safe_load((self.directory / "mine.yaml").read_text("utf-8"))
        (self.directory / "changed.yaml").write_text(yaml.safe_dump(content | yaml.safe_load(part)), "utf-8")
        load_recipe("changed.yaml", [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_runs(page, linearize, ranks, model, tiny_model, finished, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Nobody answers.
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    reader = Reader(tmp_path, linearize, ranks, model, tiny_model, finished[0])
    for language, text in blocks(page):
        if language == "bash":
            for line in filter(None, text.splitlines()):
                reader.type(line)
        elif language == "python":
            exec(text, {})
        elif language == "yaml":
            assert text.startswith("# part of mine.yaml\n"), text
            reader.put(text)
        else:
            assert not language, f"{page.name}: nobody has said what to do with {language}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)
