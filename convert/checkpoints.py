"""Checkpoints of a training stage, which all processes write and read together.

Each is written beside the others, takes its name once every process has written its files, and is gone on from only if
every file still is what was written. So a stage that is killed, or whose disk is full, has the checkpoints from before.
"""

import hashlib
import json
import shutil
from pathlib import Path

from rich.console import Console

from linearize.convert import processes
from linearize.convert.context import write_atomically

# Where a checkpoint is until it is whole.
PART = "part"
# In each: how many processes wrote it, and the SHA-256 of every file.
MANIFEST = "manifest.json"
# The newest may be damaged.
KEPT = 2


def finish(directory: Path, name: str) -> None:
    """Let the checkpoint that is in `directory / PART / name` take its place, and the oldest go."""
    part = directory / PART / name
    # Until all have written.
    processes.wait()
    manifest = {"processes": processes.count(), "files": _digests(part)}
    processes.alone(_place, directory, name, manifest)


def newest(directory: Path, console: Console) -> Path | None:
    """The latest checkpoint that is whole, or None; damaged ones are told."""
    processes.alone(shutil.rmtree, directory / PART, True)
    found = processes.alone(_newest_first, directory)
    for index, checkpoint in enumerate(found):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        instead = found[index + 1].name if index + 1 < len(found) else "the beginning"
        console.print(f"  {checkpoint}: {damage} is damaged; going on from {instead}", highlight=False, soft_wrap=True)
    return None


def saved_by(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint that is whole."""
    return _manifest(checkpoint)["processes"]


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))


def _place(directory: Path, name: str, manifest: dict) -> None:
    part = directory / PART / name
    write_atomically(part / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    # Only a damaged one is there already.
    shutil.rmtree(directory / name, ignore_errors=True)
    part.rename(directory / name)
    for old in _newest_first(directory)[KEPT:]:
        shutil.rmtree(old)


def _manifest(checkpoint: Path) -> dict | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_one = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and "processes" in manifest
    return manifest if is_one else None


def _damage(checkpoint: Path) -> str | None:
    """The first file that is not what was written, or None."""
    manifest = processes.alone(_manifest, checkpoint)
    if manifest is None:
        return MANIFEST
    found, written = _digests(checkpoint), manifest["files"]
    return next((name for name in sorted(found | written) if found.get(name) != written.get(name)), None)


def _digests(checkpoint: Path) -> dict[str, str]:
    """File -> SHA-256, read by all processes, each some."""
    own = {}
    for name in processes.share(processes.alone(_files, checkpoint)):
        with (checkpoint / name).open("rb") as file:
            own[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: digest for some in processes.everyone(own) for name, digest in some.items()}


def _files(checkpoint: Path) -> list[str]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / MANIFEST)
    return sorted(str(path.relative_to(checkpoint)) for path in files)
