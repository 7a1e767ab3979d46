"""Publishing as the last stage of a recipe, against a Hub on loopback."""

from linearize.convert import transfer

from .hub_server import REPO, local, pushed
from .runs import converted, state


def small(**push) -> dict:
    return {"transfer": None, "finetune": None, "medusa": None, "evaluate": None, "push": {"repo": REPO, **push}}


def test_a_recipe_pushes_once(hub, linearize, recipe, tmp_path):
    path = recipe(**small(private=True))
    printed = converted(linearize, path)
    run = tmp_path / "run"
    url = state(run, "push")["metrics"]["url"]
    assert url in printed and hub.repositories[REPO].private
    assert local(run / "export" / "model").items() <= hub.repositories[REPO].files().items()
    asked = len(hub.requests)
    assert "push  finished before, skipped" in converted(linearize, path)
    assert len(hub.requests) == asked
    # Trained anew, it takes the place of what is there.
    converted(linearize, path, "seed=1", "--from", "install")
    assert len(hub.repositories[REPO].revisions["main"]) == 3


def test_a_recipe_is_refused_before_anything_is_trained(hub, linearize, recipe, tiny_model, tmp_path, monkeypatch):
    def no_training(context):
        raise AssertionError("something was trained")

    monkeypatch.setattr(transfer, "run", no_training)
    path = recipe(push={"repo": REPO})
    hub.create(REPO, {"config.json": (tiny_model / "config.json").read_bytes()})
    result = linearize("convert", path)
    assert result.code == 2 and not (tmp_path / "run").exists() and not hub.changing()
    assert result.stderr.startswith(f"linearize: push: {REPO}: holds a model that is not a linearized one (llama)")
    assert "the Hub refuses the card's metadata" in linearize("convert", path, "model.base_model=no id").stderr
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "push: somebody/linear: the Hub does not accept the token" in linearize("convert", path).stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "push: somebody/linear: there is no token" in linearize("convert", path).stderr
    assert not (tmp_path / "run").exists()
    # Which asks nobody.
    asked = len(hub.requests)
    assert linearize("check", path).code == 0 and len(hub.requests) == asked


def test_a_recipe_finds_its_own_model_on_the_hub(hub, linearize, recipe, finished, tmp_path):
    """Before training, from the softmax model's configuration alone."""
    pushed(linearize, finished[0], REPO)
    converted(linearize, recipe(**small()))
    assert len(hub.repositories[REPO].revisions["main"]) == 3


def test_an_interrupted_stage_is_resumed(hub, linearize, recipe, tmp_path, monkeypatch):
    def lose(path):
        raise ConnectionError

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.before_upload, path = lose, recipe(**small())
    result = linearize("convert", path)
    assert result.code == 2 and "the upload stopped" in result.stderr and "Traceback" not in result.stderr
    assert state(tmp_path / "run", "push")["status"] == "running"
    assert "stage push was interrupted; --resume goes on with it" in linearize("convert", path).stderr
    hub.before_upload = lambda path: None
    converted(linearize, path, "--resume")
    assert state(tmp_path / "run", "push")["status"] == "done"


def test_push_sections_that_cannot_be(linearize, recipe):
    for changes, reason in (
        ({"export": None, "push": {"repo": REPO}}, "push: only an exported model can be pushed"),
        ({"push": {"repo": "a/b/c"}}, "push.repo: Repo id must be in the form"),
        ({"push": {"repo": REPO, "revision": "a b"}}, "push.revision: 'a b' is not the name of a branch"),
        ({"push": {"repo": REPO, "revision": "a", "create_pr": True}}, "push.create_pr: a pull request is opened"),
        ({"push": {}}, "push.repo: required, but missing"),
        ({"push": {"repo": REPO, "privat": True}}, "push.privat: unknown field, did you mean private?"),
    ):
        result = linearize("check", recipe(**changes))
        assert result.code == 2 and reason in result.stderr and len(result.stderr.splitlines()) == 1
