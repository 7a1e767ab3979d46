"""Publishing a model, against a Hub on loopback: what arrives there, what loads from there, and what is refused."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from linearize.hub.export import export_model
from linearize.layers.config import PRESETS
from linearize.layers.seam import install

from .hub_server import REPO, Account, Hub, local, pushed


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def sharded(tiny_model, tmp_path) -> Path:
    """The same model in other shards, untrained and without heads."""
    card = "---\nlicense: mit\nbase_model: somebody/tiny\n---\n"
    model = install(AutoModelForCausalLM.from_pretrained(tiny_model), PRESETS["swa"])
    export_model(model, tmp_path / "sharded", max_shard_size="50KB", files={"README.md": card})
    return tmp_path / "sharded"


@pytest.fixture
def refused(hub, linearize):
    """Pushes, and returns the one line that this is refused with, with and without --dry-run; nothing changes."""

    def push(*arguments) -> str:
        before = len(hub.changing())
        results = [linearize("push", *arguments, *more) for more in ((), ("--dry-run",))]
        assert [result.code for result in results] == [2, 2], results[0].stdout
        assert results[0].stderr == results[1].stderr and results[0].stdout == ""
        assert len(hub.changing()) == before
        (line,) = results[0].stderr.splitlines()
        return line.removeprefix("linearize: ")

    return push


def large(model: Path) -> list[str]:
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in model.glob("*.safetensors"))


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Of a process that knows this Hub alone, and has nothing of it yet."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_writes", "HF_HUB_DISABLE_XET": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings


def test_a_pushed_model_is_downloaded_and_generates_the_same(hub, linearize, run, tmp_path):
    model = run / "export" / "model"
    url = pushed(linearize, run, REPO)
    repository = hub.repositories[REPO]
    assert re.fullmatch(f"{hub.url}/{REPO}/commit/[0-9a-f]{{40}}", url) and not repository.private
    there = repository.files()
    card = there.pop("README.md").decode()
    del there[".gitattributes"]
    assert there == local(model) and sorted(hub.uploads()) == large(model)
    # Nobody sees half a model.
    assert len(repository.revisions["main"]) == 2
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card and "base_model: somebody/tiny" in card
    code = """
import json, sys
from transformers import AutoModelForCausalLM
ids = None
for source in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    ids = model.dummy_inputs["input_ids"] if ids is None else ids
    print("\\n" + json.dumps(model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=1).tolist()))
"""
    home = tmp_path / "home"
    outcome = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['linearize'] = None{code}", REPO, str(model)],
        capture_output=True, text=True, env=environment(hub, home),
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    downloaded, own = (line for line in outcome.stdout.splitlines() if line)
    assert json.loads(downloaded) == json.loads(own)
    assert list(home.rglob("model.safetensors")) and list(home.rglob("modeling_linearized.py"))


def test_verbs_take_a_model_of_the_hub(hub, linearize, run, tmp_path):
    pushed(linearize, run, REPO)

    def chat(model, *arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "linearize.cli", "chat", model, "--prompt", "Which river ?", "--json"]
        home = tmp_path / "home"
        return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment(hub, home))

    refused = chat(REPO)
    assert refused.returncode == 2 and refused.stderr == (
        f"linearize: {REPO}: brings code of its own, which is run with --trust-remote-code alone; read it first, at "
        f"{hub.url}/{REPO}/tree/main\n"
    )
    assert not [*(tmp_path / "home").rglob("*.safetensors")]
    answer = chat(REPO, "--trust-remote-code")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == json.loads(chat(run).stdout)
    missing = chat("somebody/nothing")
    assert missing.returncode == 2 and missing.stderr.startswith("linearize: somebody/nothing: cannot be used: ")


def test_a_second_push_updates(hub, linearize, run, sharded):
    pushed(linearize, run, REPO)
    before = len(hub.uploads())
    config = run / "export" / "model" / "config.json"
    config.write_text(config.read_text().replace('"window_size": 16', '"window_size": 8'))
    pushed(linearize, run, REPO)
    repository = hub.repositories[REPO]
    assert len(repository.revisions["main"]) == 3 and len(hub.uploads()) == before
    assert json.loads(repository.files()["config.json"])["linear_attention"]["window_size"] == 8
    assert pushed(linearize, run, REPO).startswith("unchanged: ") and len(repository.revisions["main"]) == 3

    # Of what the earlier one left, transformers would take the whole file of weights before the shards.
    repository.revisions["main"][-1]["notes.md"] = repository.revisions["main"][-1]["recipe.yaml"]
    pushed(linearize, sharded, REPO)
    names = repository.files().keys()
    assert "model-00002-of-00003.safetensors" in names and "notes.md" in names
    assert not names & {"model.safetensors", "medusa_heads.safetensors", "custom_generate/generate.py"}


def test_shards_are_pushed(hub, linearize, sharded):
    pushed(linearize, sharded, REPO)
    assert len(large(sharded)) > 2 and sorted(hub.uploads()) == large(sharded)
    files = hub.repositories[REPO].files()
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) <= files.keys()


@pytest.mark.parametrize("namespace", ["", "somebody/", "team/"])
def test_repositories_are_created_in_a_namespace(hub, linearize, run, namespace):
    hub.accounts["hf_writes"].orgs = {"team": "write"}
    pushed(linearize, run, f"{namespace}linear", "--private")
    assert list(hub.repositories) == [f"{namespace or 'somebody/'}linear"]
    assert hub.repositories[f"{namespace or 'somebody/'}linear"].private
    pushed(linearize, run, f"{namespace}linear", "--private")


def test_a_branch_is_created_and_updated(hub, linearize, run):
    for create in (True, False):
        hub.repositories.clear()
        if not create:
            hub.create(REPO)
        pushed(linearize, run, REPO, "--revision", "v2/small")
        repository = hub.repositories[REPO]
        assert repository.files("main").keys() == {".gitattributes"}
        assert local(run / "export" / "model").items() <= repository.files("v2/small").items()
        assert pushed(linearize, run, REPO, "--revision", "v2/small").startswith("unchanged: ")


def test_a_pull_request_is_opened_and_updated(hub, linearize, run):
    # By somebody who may not write there.
    hub.create("other/linear")
    table = pushed(linearize, run, "other/linear", "--create-pr", "--dry-run")
    assert "other/linear exists, public; pull request to main" in table and not hub.changing()
    url = pushed(linearize, run, "other/linear", "--create-pr")
    assert url == f"{hub.url}/other/linear/discussions/1"
    repository = hub.repositories["other/linear"]
    assert repository.files("main").keys() == {".gitattributes"}
    assert local(run / "export" / "model").items() <= repository.files("refs/pr/1").items()
    hub.accounts["hf_writes"].orgs = {"other": "write"}
    assert pushed(linearize, run, "other/linear", "--revision", "refs/pr/1").startswith("unchanged: ")


def test_an_interrupted_upload_goes_on(hub, linearize, run, monkeypatch):
    """The connection is lost after the first large file, for longer than huggingface_hub tries again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.before_upload = lose_the_second()
    result = linearize("push", run, REPO)
    assert result.code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"linearize: {REPO}: the upload stopped (Error while uploading 'model.safetensors'")
    assert line.endswith("pushed again, it goes on with what is missing") and "Traceback" not in result.stderr
    assert hub.repositories[REPO].files().keys() == {".gitattributes"} and len(hub.uploads()) == 1

    hub.before_upload = lambda path: None
    pushed(linearize, run, REPO)
    assert sorted(hub.uploads()) == large(run / "export" / "model")


def test_a_killed_upload_goes_on(hub, linearize, run, tmp_path):
    """The whole process is, while the second large file is on its way."""
    process = started(hub, run, tmp_path)
    hub.before_upload = lose_the_second(process.kill)
    printed, bars = process.communicate()
    assert process.returncode == -9 and printed == "" and len(hub.uploads()) == 1
    # What somebody at the command line sees of it.
    assert "medusa_heads.safetensors: 100%" in bars
    hub.before_upload = lambda path: None
    pushed(linearize, run, REPO)
    assert sorted(hub.uploads()) == large(run / "export" / "model")


def lose_the_second(meanwhile=lambda: None):
    """The first large file arrives, and nothing after it."""
    first = []

    def lose(path):
        if first:
            meanwhile()
            raise ConnectionError
        first.append(path)

    return lose


def started(hub: Hub, run: Path, directory: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "linearize.cli", "push", str(run), REPO],
        env=environment(hub, directory / "home"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_dry_run_changes_nothing(hub, linearize, run, sharded):
    table = pushed(linearize, run, REPO, "--dry-run", "--private", "--revision", "small")
    assert f"{REPO} would be created, private; branch small, which would be created" in table
    assert re.search(r"model.safetensors +│ +\d+\.\d kB │ LFS +│ new ", table)
    assert re.search(r"config.json +│ +\d+\.\d kB │ regular │ new ", table)
    assert not hub.changing() and not hub.repositories

    pushed(linearize, run, REPO)
    before = len(hub.changing())
    plan = json.loads(pushed(linearize, run, REPO, "--dry-run", "--json"))
    assert plan["exists"] and not plan["private"] and not plan["new_branch"]
    assert {file["change"] for file in plan["files"]} == {"unchanged"}
    plan = json.loads(pushed(linearize, sharded, REPO, "--dry-run", "--json"))
    changes = {file["path"]: (file["change"], file["storage"]) for file in plan["files"]}
    assert changes["model.safetensors"] == ("removed", "LFS")
    assert changes["model-00001-of-00003.safetensors"] == ("new", "LFS")
    assert changes["config.json"] == ("changed", "regular") and changes["linearize_seam.py"][0] == "unchanged"
    assert len(hub.changing()) == before
    # As it said.
    names = set(hub.repositories[REPO].files())
    pushed(linearize, sharded, REPO)
    removed = {name for name, (change, _) in changes.items() if change == "removed"}
    assert set(hub.repositories[REPO].files()) == (names | changes.keys()) - removed


def test_json_says_where_it_went(hub, linearize, run):
    result = linearize("push", run, REPO, "--json")
    told = json.loads(result.stdout)
    assert told["name"] == REPO and told["url"] == f"{hub.url}/{REPO}/commit/{told['commit']}" and told["changed"]
    assert result.stderr == ""


def test_tokens_that_may_not(hub, refused, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert refused(run, REPO).startswith(f"{REPO}: the Hub does not accept the token; run `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    assert refused(run, REPO).startswith(f"{REPO}: there is no token for the Hub; run `hf auth login`, or set HF_TOKEN")
    # As `hf auth login` leaves it.
    (tmp_path / "token").write_text("hf_reads")
    hub.accounts["hf_reads"] = Account("somebody", role="read")
    assert refused(run, REPO).startswith(f"{REPO}: the token a token may only read")
    assert refused(run, REPO, "--create-pr").startswith(f"{REPO}: the token a token may only read")
    hub.accounts["hf_reads"] = Account("somebody", role="fineGrained", scopes={"somebody": ["repo.content.read"]})
    assert "the token has no right to create repositories of somebody" in refused(run, REPO)
    hub.create(REPO)
    assert refused(run, REPO) == f"{REPO}: the token has no right to write there"


def test_a_token_for_one_repository_is_enough(hub, linearize, run, monkeypatch):
    hub.accounts["hf_writes"] = Account("somebody", role="fineGrained", scopes={REPO: ["repo.write"]})
    hub.create(REPO)
    pushed(linearize, run, REPO)
    hub.accounts["hf_writes"].scopes = {"somebody": ["repo.write"]}
    pushed(linearize, run, "somebody/another")


def test_namespaces_of_others(hub, refused, run):
    hub.accounts["hf_writes"].orgs = {"team": "write", "club": "read"}
    for name in ("other/linear", "club/linear"):
        line = refused(run, name)
        assert line.startswith(f"{name}: does not exist, and somebody has no right to create it")
        assert line.endswith("in somebody, team")
    hub.create("other/linear")
    assert refused(run, "other/linear") == "other/linear: the token has no right to write there"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a/b/c"], "repo: Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
        (["somebody/no spaces"], "repo: Repo id must use alphanumeric chars"),
        ([REPO, "--revision", "a b"], "revision: 'a b' is not the name of a branch"),
        ([REPO, "--revision", "refs/heads/a"], "revision: 'refs/heads/a' is not the name of a branch"),
        ([REPO, "--revision", "0" * 40], f"revision: {'0' * 40} is a commit"),
        ([REPO, "--revision", "a", "--create-pr"], "create_pr: a pull request is opened against main"),
        ([REPO, "--create-pr"], f"{REPO}: does not exist, so a pull request has nothing to be made to"),
    ],
)
def test_names_that_cannot_be(refused, run, arguments, reason):
    assert refused(run, *arguments).startswith(reason)


def test_revisions_that_are_no_branches(hub, refused, run):
    hub.create(REPO).tags.append("v1")
    assert refused(run, REPO, "--revision", "v1") == f"{REPO}: v1 is a tag, which stays where it is; name a branch"
    assert refused(run, REPO, "--revision", "refs/pr/7") == f"{REPO}: has no pull request refs/pr/7"


def test_a_public_repository_is_not_taken_for_a_private_one(hub, refused, run):
    hub.create(REPO)
    assert "exists and is public, but is to be private" in refused(run, REPO, "--private")


def test_another_model_is_not_overwritten(hub, refused, run, tiny_model):
    def there(**files) -> str:
        hub.create(REPO, {name.replace("__", "."): data for name, data in files.items()})
        before = hub.repositories[REPO].files()
        line = refused(run, REPO)
        assert hub.repositories[REPO].files() == before
        assert line.startswith(f"{REPO}: ") and line.endswith("choose another repository, or remove what it holds")
        return line

    softmax = (tiny_model / "config.json").read_bytes()
    assert "holds a model that is not a linearized one (llama)" in there(config__json=softmax)
    assert "holds model.gguf, but no linearized model" in there(model__gguf=b"GGUF")
    assert "its config.json or README.md cannot be read" in there(config__json=b"{")
    linear = (run / "export" / "model" / "config.json").read_text()
    wider = linear.replace('"intermediate_size": 64', '"intermediate_size": 128')
    assert "holds another model (intermediate_size 128 instead of 64)" in there(config__json=wider.encode())
    other = linear.replace("linearized_llama", "linearized_mistral")
    assert "holds another model (model_type mistral instead of llama" in there(config__json=other.encode())
    card = b"---\nbase_model: somebody/else\n---\n"
    line = there(config__json=linear.encode(), README__md=card)
    assert "holds another model (base_model somebody/else instead of somebody/tiny)" in line
    unreadable = there(config__json=linear.encode(), README__md=b"---\nbase_model: [\n---\n")
    assert "its config.json or README.md cannot be read" in unreadable


def test_models_that_are_none(refused, run, tiny_model, tmp_path):
    model = run / "export" / "model"
    assert "holds no exported model" in refused(tmp_path / "nothing", REPO)
    assert "is not a linearized model" in refused(tiny_model, REPO)
    (model / "medusa_heads.safetensors").rename(tmp_path / "heads")
    assert "is not a whole model, medusa_heads.safetensors is missing" in refused(run, REPO)
    (tmp_path / "heads").rename(model / "medusa_heads.safetensors")
    (model / "modeling_linearized.py").rename(tmp_path / "code.py")
    assert "is not a whole model, modeling_linearized.py is missing" in refused(run, REPO)
    (tmp_path / "code.py").rename(model / "modeling_linearized.py")
    card = (model / "README.md").read_text()
    (model / "README.md").write_text(card.replace("license: mit", "license: ["))
    assert f"{model}: its config.json or README.md cannot be read" in refused(run, REPO)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    assert "model.safetensors is not a whole safetensors file" in refused(run, REPO)
    (model / "config.json").write_text("{")
    assert f"{model}/config.json: is no JSON" in refused(run, REPO)


def test_a_card_that_the_hub_refuses(refused, run):
    card = run / "export" / "model" / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: none of them"))
    expected = 'the Hub refuses the card\'s metadata: Invalid metadata in README.md. - "license" none of them'
    assert refused(run, REPO) == f"{REPO}: {expected}"


def test_a_hub_that_is_not_there(linearize, run, monkeypatch, hub):
    def told() -> str:
        result = linearize("push", run, REPO)
        (line,) = result.stderr.splitlines()
        assert result.code == 2 and line.startswith(f"linearize: {REPO}: ")
        return line

    for endpoint in ("http://127.0.0.1:1", hub.url.removeprefix("http://")):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert f"{endpoint} cannot be reached (" in told()
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.url}/lfs")
    assert "the Hub answers 404" in told()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in told()
