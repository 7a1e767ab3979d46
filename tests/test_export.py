"""What a run leaves: the exported directory loads by itself, generates, drafts, and is measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.convert.context import Context
from linearize.convert.models import model_after
from linearize.recipes.loader import load_recipe

from .runs import state

# Puts the package out of reach, as on a machine that never had it.
WITHOUT_LINEARIZE = "import sys; sys.modules['linearize'] = None\n"


def load_elsewhere(model: Path, code: str) -> str:
    """Run `code` in a process that cannot import linearize; `directory` and the usual names are defined."""
    prelude = "import json, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    script = f"{WITHOUT_LINEARIZE}{prelude}directory = {str(model)!r}\n{code}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_export_loads_without_the_package_and_equals_the_model_in_memory(finished, tmp_path):
    run, *_ = finished
    model = model_after(Context(load_recipe(str(run / "resolved.yaml")), run, None), "finetune")
    ids = torch.arange(1, 101).view(1, -1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    load_elsewhere(
        run / "export" / "model",
        f"""
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
torch.save(model(torch.arange(1, 101).view(1, -1)).logits.detach(), {str(tmp_path / "logits.pt")!r})
""",
    )
    logits = torch.load(tmp_path / "logits.pt")
    # Merging the adapters rounds once more.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_export_generates_with_its_own_cache(finished):
    run, *_ = finished
    out = load_elsewhere(
        run / "export" / "model",
        """
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
text = tokenizer.apply_chat_template([{"role": "user", "content": "the and of"}], tokenize=False)
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
arguments = dict(pad_token_id=1, max_new_tokens=60, min_new_tokens=60, do_sample=False, return_dict_in_generate=True)
cached, plain = (model.generate(**inputs, **arguments, use_cache=use) for use in (True, False))
print("\\n" + json.dumps([torch.equal(cached.sequences, plain.sequences), type(cached.past_key_values).__name__, text]))
""",
    )
    assert json.loads(out.splitlines()[-1]) == [True, "LinearCache", "user the and of "]


def test_export_decodes_speculatively(finished, linearize):
    """With the heads and the tree that it carries, by itself and by the command line."""
    run, *_ = finished
    out = load_elsewhere(
        run / "export" / "model",
        """
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
ids = torch.arange(10, 30).view(1, -1)
arguments = dict(pad_token_id=1, max_new_tokens=40, do_sample=False)
plain = model.generate(ids, **arguments)
texts = [model.generate(ids, **arguments, custom_generate=how, trust_remote_code=True)
         for how in (str(directory), model.speculate)]
print("\\n" + json.dumps([torch.equal(plain, text) for text in texts]))
""",
    )
    assert json.loads(out.splitlines()[-1]) == [True, True]
    tree = json.loads((run / "export" / "model" / "config.json").read_text())["medusa"]["tree"]
    assert tree == state(run, "medusa")["metrics"]["tree"]
    prompt = ("chat", run, "--prompt", "the and of", "--max-new-tokens", 20)
    plain, speculative = linearize(*prompt, "--json"), linearize(*prompt, "--json", "--speculative")
    assert json.loads(speculative.stdout) == json.loads(plain.stdout), speculative.stderr
    assert json.loads(plain.stdout)["reply"] in linearize(*prompt, "--speculative").stdout.replace("\n", "")


def test_export_is_refused_without_trust_remote_code(finished):
    run, *_ = finished
    # A machine has no terminal to ask on.
    with pytest.raises((ValueError, KeyError), match="trust_remote_code|linearized_llama"):
        AutoModelForCausalLM.from_pretrained(run / "export" / "model", trust_remote_code=False)


def test_export_uses_the_backends_of_an_installed_package(finished, monkeypatch):
    from linearize.layers import kernels

    run, *_ = finished
    calls = []

    def faster(problem):
        calls.append(problem)
        return kernels.reference(problem)

    monkeypatch.setitem(kernels.BACKENDS, "faster", kernels.Backend(faster))
    # Another test may have loaded it; backends are taken when its code is imported.
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "model", trust_remote_code=True)
    model(torch.arange(1, 20).view(1, -1))
    assert len(calls) == 2
    # And what it decodes with on a GPU.
    copy = sys.modules[f"{type(model).__module__.rpartition('.')[0]}.linearize_kernels"].triton_kernels
    assert copy.step is not None and vars(copy) == vars(kernels.triton_kernels)


def test_export_carries_what_people_look_for(finished):
    run, *_ = finished
    model = run / "export" / "model"
    card = (model / "README.md").read_text()
    metrics = json.loads((model / "metrics.json").read_text())
    measured = metrics["evaluate"]["models"]["after finetune"]
    assert "base_model: somebody/tiny" in card and "license: mit" in card
    teacher = metrics["evaluate"]["models"]["teacher (softmax)"]["text"]
    perplexities = [(measured["text"][length]["perplexity"], teacher[length]["perplexity"]) for length in ("64", "128")]
    short, long = (f"{perplexity:.2f} ({perplexity / of_teacher:.2f})" for perplexity, of_teacher in perplexities)
    sizes = {"copying": "32", "passkey": "100", "recall": "4"}
    shares = [f"{measured[name][size]['accuracy']:.0%}" for name, size in sizes.items()]
    assert f"| **this model** (after finetune) | {' | '.join([short, long, *shares])} |" in card
    # Nobody is told where it was made.
    for name in ("README.md", "recipe.yaml", "metrics.json", "config.json"):
        assert str(run.parent.parent) not in (model / name).read_text(), name
    names = {path.name for path in model.iterdir()}
    assert {"model.safetensors", "recipe.yaml", "generation_config.json", "medusa_heads.safetensors"} <= names
    assert not any("lora" in name for name in load_file(model / "model.safetensors"))
    assert AutoTokenizer.from_pretrained(model, trust_remote_code=True).chat_template


def test_masters_stay_fp32_when_loaded_in_half_precision(finished):
    run, *_ = finished
    model = AutoModelForCausalLM.from_pretrained(
        run / "export" / "model", trust_remote_code=True, dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if ".linear_attention." in n} == {torch.float32}
    model(torch.arange(1, 20).view(1, -1))


def test_cache_bytes_do_not_grow(finished):
    run, *_ = finished
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "model", trust_remote_code=True)
    sizes = []
    for tokens in (50, 400):
        ids = torch.randint(2, 200, (1, tokens), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            sizes.append(model(ids, use_cache=True).past_key_values.nbytes)
    plan = json.loads((run / "plan.json").read_text())
    assert sizes == [plan["state_bytes"]] * 2


def test_chat_and_evaluate_on_the_export(linearize, finished):
    run, *_ = finished
    told = json.loads(linearize("chat", run, "--prompt", "the and of", "--max-new-tokens", 8, "--json").stdout)
    plan = json.loads((run / "plan.json").read_text())
    assert isinstance(told["reply"], str) and told["cache_bytes"] == plan["state_bytes"]
    options = ["--copying", 32, "--passkey", 100, "--recall", 4]
    result = linearize("evaluate", run, "--tokens", 256, "--lengths", 64, "--lengths", 128, *options, "--json")
    assert result.code == 0, result.stderr
    measured, expected = json.loads(result.stdout), state(run, "evaluate")["metrics"]
    for name, figures in {**expected["ablations"], "linearized": expected["models"]["after finetune"]}.items():
        again = (measured["ablations"] | measured["models"])[name]
        assert again.keys() == figures.keys()
        for length, text in figures["text"].items():
            # Merging the adapters rounds once more.
            assert again["text"][length]["perplexity"] == pytest.approx(text["perplexity"], rel=1e-4)


def test_evaluate_on_a_softmax_model(linearize, finished, tiny_model):
    run, *_ = finished
    options = ["--tokens", 256, "--lengths", 64, "--lengths", 128, "--copying", 0]
    result = linearize("evaluate", tiny_model, *options, "--json")
    assert result.code == 0, result.stderr
    (teacher,) = json.loads(result.stdout)["models"].values()
    expected = state(run, "evaluate")["metrics"]["models"]["teacher (softmax)"]
    for length in ("64", "128"):
        assert teacher["text"][length]["perplexity"] == pytest.approx(expected["text"][length]["perplexity"], rel=1e-6)
    shown = linearize("evaluate", tiny_model, *options).stdout
    assert f"{expected['text']['128']['perplexity']:.2f} (1.00)" in shown
