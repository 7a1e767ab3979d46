"""Publish an exported model: say what would be sent to a repository on the Hub, and send it.

Large files go up one after the other, then one commit names them all: nobody downloads half a model, and a file that
has arrived stays at the Hub and is not sent again, by Git LFS or by Xet. `upload_folder` and `create_commit` by
themselves hand all files to Xet at once, and it begins all of them anew after an interruption.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from transformers.utils import CONFIG_NAME

from linearize import __version__
from linearize.hub.card import card_for
from linearize.hub.repository import CARD, PushError, Repository, answers_named, hub_api, look, read_identity
from linearize.layers.speculative import HEADS_FILE
from linearize.recipes.schema import PushSection

# What an export writes and the next one may not: weights in other shards, heads, code. Stale ones would be loaded.
WEIGHT_FILES = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", HEADS_FILE)
EXPORTED = (*WEIGHT_FILES, "linearize_*.py", "custom_generate/generate.py")
# As the Hub tells them apart in a new repository: by name, or by size in bytes.
LFS_SUFFIXES = (".safetensors", ".bin", ".model")
LFS_SIZE = 10 * 2**20


@dataclass(frozen=True)
class Change:
    """What a push does to one file: `new`, `changed`, `unchanged` or `removed`; `size` in bytes, as it is after it."""

    path: str
    size: int
    storage: str
    change: str


@dataclass(frozen=True)
class Plan:
    """What a push would do; the fields are those of `Repository`, and whether it would open a pull request."""

    name: str
    exists: bool
    private: bool | None
    revision: str
    new_branch: bool
    create_pr: bool
    files: list[Change]


@dataclass(frozen=True)
class Pushed:
    """Where a model has gone: `url` of its commit or pull request, and whether that is a new one."""

    name: str
    revision: str
    commit: str
    url: str
    changed: bool


def read_exported(directory: Path) -> tuple[dict[str, Any], str]:
    """Identity and card of an exported model.

    Raises:
        PushError: files are missing, apart from weights, which `sources.check_weights` looks at.
    """
    config = json.loads((directory / CONFIG_NAME).read_text("utf-8"))
    modules = {reference.partition(".")[0] for reference in config.get("auto_map", {}).values()}
    needed = [CARD, *sorted(f"{module}.py" for module in modules), *([HEADS_FILE] if "medusa" in config else [])]
    for name in needed:
        if not (directory / name).is_file():
            raise PushError(f"{directory}: is not a whole model, {name} is missing; export it again")
    try:
        return read_identity(directory / CONFIG_NAME, directory / CARD)[0], (directory / CARD).read_text("utf-8")
    except ValueError as error:
        raise PushError(f"{directory}: its {CONFIG_NAME} or {CARD} cannot be read ({error})") from error


def plan(directory: Path, section: PushSection) -> Plan:
    """What `push` would do; large files are read where only their content tells whether they are there already.

    Raises:
        PushError: as `push`, but for what the upload alone shows.
    """
    repository = look(section, *read_exported(directory))
    found = []
    for path, content in _contents(directory, repository.name).items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        there = repository.files.get(path)
        lfs = there.lfs if there else _is_large(path, size)
        same = there is not None and there.size == size and there.digest == _digest(content, lfs)
        found.append(Change(path, size, _storage(lfs), "unchanged" if same else "changed" if there else "new"))
    for path in _stale(directory, repository):
        found.append(Change(path, 0, _storage(repository.files[path].lfs), "removed"))
    branch = (repository.revision, repository.new_branch, section.create_pr)
    return Plan(repository.name, repository.exists, repository.private, *branch, found)


def plan_table(plan: Plan) -> Group:
    """A plan for people."""
    state = "exists" if plan.exists else "would be created"
    visible = {True: "private", False: "public", None: "public, unless its owner's settings say otherwise"}
    branch = f"{'pull request to' if plan.create_pr else 'branch'} {plan.revision}"
    branch += ", which would be created" if plan.new_branch else ""
    table = Table("file")
    table.add_column("size", justify="right")
    table.add_column("kept as")
    table.add_column("on the Hub")
    for change in plan.files:
        table.add_row(change.path, decimal(change.size), change.storage, change.change)
    sent = sum(change.size for change in plan.files if change.change in ("new", "changed"))
    return Group(
        f"{plan.name} {state}, {visible[plan.private]}; {branch}",
        table,
        f"{decimal(sent)} to send; nothing was changed",
    )


def push(directory: Path, section: PushSection, progress: bool = False) -> Pushed:
    """Create the repository and the branch where there is none, and commit all of an exported model's files.

    Args:
        progress: show huggingface_hub's bars on stderr.

    Raises:
        PushError: something is in the way, or the upload stopped; pushed again, it goes on with what is missing.
    """
    model, card = read_exported(directory)
    repository = look(section, model, card)
    api, name = hub_api(), repository.name
    with answers_named(name):
        if not repository.exists:
            api.create_repo(name, private=repository.private, exist_ok=True)
        if repository.new_branch:
            api.create_branch(name, branch=repository.revision, exist_ok=True)
    removed = [CommitOperationDelete(path) for path in _stale(directory, repository)]
    added = [CommitOperationAdd(path, content) for path, content in _contents(directory, name).items()]
    where = {"revision": repository.revision, "create_pr": section.create_pr}
    try:
        with _bars(progress):
            for file in added:
                if _is_large(file.path_in_repo, file.upload_info.size):
                    api.preupload_lfs_files(name, [file], **where, free_memory=False)
            message = f"Upload a linearized model (linearize {__version__})"
            done = api.create_commit(name, [*removed, *added], commit_message=message, **where)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # From threads that upload comes which file it was, and behind it why.
        reason = error if isinstance(error, HTTPError) or error.__cause__ is None else f"{error} {error.__cause__}"
        raise PushError(
            f"{name}: the upload stopped ({' '.join(str(reason).split())}); "
            "pushed again, it goes on with what is missing"
        ) from error
    changed = done.oid != repository.commit
    return Pushed(name, repository.revision, done.oid, done.pr_url or done.commit_url, changed)


def _contents(directory: Path, name: str) -> dict[str, Path | bytes]:
    """Path in the repository -> the file, or what stands in it."""
    files = {}
    for file in sorted(directory.rglob("*")):
        path = file.relative_to(directory)
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in path.parts):
            files[path.as_posix()] = file
    return files | {CARD: card_for(name, files[CARD].read_text("utf-8")).encode()}


def _stale(directory: Path, repository: Repository) -> list[str]:
    """What an earlier export has left there and this one has not."""
    left = [path for path in repository.files if any(fnmatch(path, pattern) for pattern in EXPORTED)]
    return sorted(path for path in left if not (directory / path).is_file())


def _is_large(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def _storage(lfs: bool) -> str:
    return "LFS" if lfs else "regular"


def _digest(content: Path | bytes, lfs: bool) -> str:
    if isinstance(content, bytes) or not lfs:
        data = content if isinstance(content, bytes) else content.read_bytes()
        return (hashlib.sha256(data) if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    if not shown:
        yield
        return
    with warnings.catch_warnings():
        # Where HF_HUB_DISABLE_PROGRESS_BARS has settled it.
        warnings.simplefilter("ignore")
        enable_progress_bars()
        try:
            yield
        except BaseException:
            # The one that was interrupted has not ended its line.
            print(file=sys.stderr)
            raise
        finally:
            disable_progress_bars()
