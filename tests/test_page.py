"""The report of a run: parsed as HTML it is whole, needs nothing but itself, and has a section for what there is."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from linearize.convert.page import REPORT, SECTIONS, write_report
from linearize.hub.figures import FIGURES
from linearize.recipes.loader import dump_recipe

from .measured import full_metrics, measured_recipe
from .runs import converted

VERSIONS = {"linearize": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"}
PLAN = {
    "model": "tiny", "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "features": 16, "parameters": 34976,
    "stages": [{"stage": "transfer", "steps": 6, "tokens": 768, "trained": 944, "parameters": 35920}],
    "kept_heads": 1, "kept_bytes": 64, "kept_tokens": None, "state_bytes": 11904,
    "kv_bytes": {"2048": 524288, "32768": 8388608}, "memory": 1, "disk": 1,
}  # fmt: skip
VOID = {"meta", "link", "img", "br", "hr", "input"}
# What a browser fetches by itself when it shows a page; `a` is for the reader to follow.
FETCHED = {"src", "srcset", "poster", "data", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """Elements by tag with their attributes, ids, and the text of a page whose elements are all closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self) -> Counter:
        return Counter(attributes["id"] for _, attributes in self.elements if "id" in attributes)


@pytest.fixture
def run(tmp_path):
    """Writes the directory of a run with these metrics and returns it."""

    def write(metrics: dict, running: tuple[str, ...] = (), plan: bool = True, **recipe) -> Path:
        directory = tmp_path / "run"
        for stage, figures in metrics.items():
            status = "running" if stage in running else "done"
            state = {"stage": stage, "status": status, "input_hash": "", "versions": VERSIONS}
            (directory / stage).mkdir(parents=True)
            (directory / stage / "state.json").write_text(json.dumps({**state, "metrics": figures}))
        changes = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
        (directory / "resolved.yaml").write_text(dump_recipe(measured_recipe(*changes)))
        if plan:
            (directory / "plan.json").write_text(json.dumps(PLAN))
        return directory

    return write


def read(directory: Path) -> Page:
    return Page(write_report(directory, Console(quiet=True)).read_text("utf-8"))


def sections(page: Page) -> list[str]:
    return [attributes["id"].removesuffix("-section") for attributes in page.all("section")]


def test_page_of_a_run_that_measured_everything_has_all_figures_and_sections(run):
    page = read(run(full_metrics()))
    assert {figure["id"] for figure in page.all("figure")} == FIGURES.keys()
    assert len(page.all("svg")) == len(FIGURES)
    assert sections(page) == list(SECTIONS)
    text = " ".join(" ".join(page.text).split())
    # 11904 bytes of state and 64 for each of 2048 tokens.
    for shown in ("1.17 ×", "1 of 6 key heads stay softmax", "15.11 (1.17)", "builtin:heldout", "139.6 KiB"):
        assert shown in text, shown


def test_page_needs_nothing_but_itself(run):
    directory = run(full_metrics())
    page = read(directory)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "video", "audio"}
    for tag, attributes in page.elements:
        for name in FETCHED & attributes.keys():
            assert attributes[name].startswith(("#", "data:image/png;base64,")), (tag, name)
        if tag in ("image", "use") and "href" in attributes:
            assert attributes["href"].startswith(("#", "data:"))
    text = (directory / REPORT).read_text("utf-8")
    assert "@import" not in text and "@font-face" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_there_once_and_links_find_them(run):
    page = read(run(full_metrics()))
    assert set(page.ids.values()) == {1}
    targets = [link["href"] for link in page.all("a")]
    assert targets == [f"#{name}-section" for name in SECTIONS]
    targets += [it[name] for _, it in page.elements for name in ("xlink:href", "href") if it.get(name, "")[:1] == "#"]
    targets += [f"#{it['aria-labelledby']}" for _, it in page.elements if "aria-labelledby" in it]
    assert {target[1:] for target in targets} <= page.ids.keys()


def test_page_can_be_heard_as_well_as_seen(run):
    page = read(run(full_metrics()))
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    drawings = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(drawings) == len(FIGURES) and all(len(drawing["aria-label"]) > 30 for drawing in drawings)
    assert len(page.all("caption")) == len(page.all("table")) > 3
    assert all(heading["scope"] in ("col", "row", "rowgroup") for heading in page.all("th"))
    # What scrolls can be reached with the keyboard, and has a name.
    scrolling = [attributes for attributes in page.all("div") if attributes.get("class") == "scrolling"]
    assert all(it["tabindex"] == "0" and it["aria-label"] for it in scrolling)


@pytest.mark.parametrize(
    "left_out, gone",
    [
        (("evaluate",), {"quality"}),
        (("medusa",), {"speculation"}),
        (("transfer", "finetune", "medusa"), {"training", "speculation"}),
        (("evaluate", "transfer", "install"), {"quality", "attention"}),
    ],
)
def test_sections_without_data_are_left_out(run, left_out, gone):
    metrics = {stage: figures for stage, figures in full_metrics().items() if stage not in left_out}
    page = read(run(metrics))
    assert sections(page) == [name for name in SECTIONS if name not in gone]
    assert [link["href"] for link in page.all("a")] == [f"#{name}-section" for name in sections(page)]
    assert len(page.all("figure")) > 0


def test_run_that_has_just_begun_has_a_page_too(run):
    page = read(run({"load": {}}, running=("load",), plan=False))
    assert sections(page) == ["recipe", "commands"]
    assert "Not finished: load." in "".join(page.text)


def test_interrupted_stage_shows_what_the_finished_ones_measured(run):
    page = read(run(full_metrics() | {"evaluate": {}}, running=("evaluate",)))
    assert "quality" not in sections(page) and "training" in sections(page)
    assert "Not finished: evaluate." in "".join(page.text)


def test_what_people_write_stays_text(run):
    name = "<script>alert('a & b')</script>"
    directory = run(full_metrics(), name=name)
    page = read(directory)
    assert not page.all("script")
    assert name in page.text
    assert "&lt;script&gt;" in (directory / REPORT).read_text("utf-8")


def test_page_is_the_same_each_time(run):
    directory = run(full_metrics())
    first = write_report(directory, Console(quiet=True)).read_bytes()
    assert write_report(directory, Console(quiet=True)).read_bytes() == first


def test_figure_that_cannot_be_drawn_is_named_on_the_page_and_on_the_console(run, linearize):
    metrics = full_metrics()
    metrics["transfer"]["error_of_head"] = {"0": "high"}
    directory = run(metrics)
    result = linearize("report", directory)
    assert result.code == 0
    assert "figure transfer_error is missing: ValueError: " in result.stdout
    page = Page((directory / REPORT).read_text("utf-8"))
    assert {figure["id"] for figure in page.all("figure")} == FIGURES.keys()
    assert len(page.all("svg")) == len(FIGURES) - 1
    assert "This figure could not be drawn: ValueError: " in "".join(page.text)


def test_every_conversion_ends_with_its_report(finished, linearize, tmp_path):
    directory, told, _ = finished
    report = directory / REPORT
    assert told.splitlines()[-1] == str(report)
    page = Page(report.read_text("utf-8"))
    assert {"quality", "training", "speculation"} <= set(sections(page))
    metrics = json.loads((directory / "evaluate" / "state.json").read_text())["metrics"]
    assert f"{metrics['models']['after finetune']['text']['128']['perplexity']:.2f} (" in "".join(page.text)
    again = linearize("report", directory, "--out", tmp_path / "again.html")
    assert (again.code, again.stdout) == (0, f"{tmp_path / 'again.html'}\n")
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_conversion_that_ends_without_evaluation_has_a_report(linearize, recipe, tmp_path):
    converted(linearize, recipe(finetune=None, medusa=None, evaluate=None, export=None))
    page = Page((tmp_path / "run" / REPORT).read_text("utf-8"))
    assert "training" in sections(page) and "quality" not in sections(page)


def test_bad_places_for_a_report_are_refused(run, linearize, tmp_path):
    directory = run(full_metrics())
    other = tmp_path / "notes.html"
    other.write_text("<p>mine</p>")
    for arguments, why in [
        ((tmp_path,), f"{tmp_path}: holds no run"),
        ((directory, "--out", tmp_path), "is a directory"),
        ((directory, "--out", tmp_path / "no" / "page.html"), "there is no directory"),
        ((directory, "--out", other), "exists and is no report of linearize"),
    ]:
        result = linearize("report", *arguments)
        assert result.code == 2 and why in result.stderr and "Traceback" not in result.stderr
    assert other.read_text() == "<p>mine</p>"
    (directory / "finetune" / "state.json").write_text("{")
    result = linearize("report", directory)
    assert result.code == 2 and "is damaged" in result.stderr
