"""A recipe's stages in order: finished ones are skipped, interrupted ones resumed, nothing redone unasked."""

import gc
import importlib
import os
import shutil
import time
from typing import Any

import torch
import yaml

from linearize.convert import processes
from linearize.convert.batches import shared
from linearize.convert.context import STAGES, STATE, Context, StageError, write_atomically
from linearize.convert.launch import LOG
from linearize.layers.attending import UnsupportedModelError
from linearize.recipes.loader import dump_recipe
from linearize.recipes.training import Training

RESOLVED = "resolved.yaml"
# What one process does for all; the other stages share their work.
ALONE = ("load", "install", "export", "push")


def run(context: Context, todo: list[str], start: str | None = None) -> None:
    """Run the stages that `stages_to_run` found; `start` as there. All processes of a launch do, see `processes`."""
    processes.alone(_prepare, context, start)
    if context.device.type == "cuda":
        # Products of fp32 on tensor cores; their sums stay fp32.
        torch.set_float32_matmul_precision("high")
    for stage in todo:
        context.console.print(f"[bold]{stage}[/bold]")
        began = time.monotonic()
        if processes.is_main() and context.state(stage) is None:
            context.write_state(stage, "running", {})
        module = importlib.import_module(f"linearize.convert.{stage}")
        try:
            artifact = processes.alone(module.run, context) if stage in ALONE else module.run(context)
        except UnsupportedModelError as error:
            # What only the model's forward pass shows.
            raise StageError(f"model.source: {error}") from error
        seconds = round(time.monotonic() - began, 1)
        # The next stage reads what this one has written.
        processes.alone(_finish, context, stage, {**artifact.metrics, "seconds": seconds})
        context.console.print(f"  done in {seconds:.0f} s -> {artifact.directory}", highlight=False)
        # What has trained refers to itself, and would be there beside the next stage's model.
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _prepare(context: Context, start: str | None) -> None:
    if start is not None:
        # What follows from a stage that is redone is not finished any more; where this ends halfway, no stage is said
        # to be finished whose files, or those that it follows from, are gone.
        for stage in reversed(STAGES[STAGES.index(start) :]):
            (context.stage_directory(stage) / STATE).unlink(missing_ok=True)
            shutil.rmtree(context.stage_directory(stage), ignore_errors=True)
    write_atomically(context.directory / RESOLVED, dump_recipe(context.recipe))


def _finish(context: Context, stage: str, metrics: dict[str, Any]) -> None:
    context.write_state(stage, "done", metrics)
    shutil.rmtree(context.stage_directory(stage) / "checkpoints", ignore_errors=True)


def _check_directory(context: Context) -> None:
    directory = context.directory
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise StageError(f"--out {directory}: {existing} is a file; choose a directory")
    if not os.access(existing, os.W_OK):
        raise StageError(f"--out {directory}: {existing} is not writable; choose another directory")
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if held - {LOG} and RESOLVED not in held:
        raise StageError(f"--out {directory}: is not empty and holds no run of linearize; choose another directory")


def stages_to_run(
    context: Context, only: str | None, start: str | None, resume: bool, count: int = 1
) -> list[str]:
    """What is left to do.

    Args:
        only: this stage alone.
        start: this stage and those after it, again.
        resume: go on with a stage that was interrupted.
        count: how many processes are to share the training.

    Raises:
        StageError: the directory holds something else, a stage before was not run, one was interrupted and neither
            `resume` nor `start` says what to do about it, or so many processes cannot share a stage or its model.
    """
    _check_directory(context)
    stages = context.stages()
    for stage in stages:
        section = getattr(context.recipe, stage, None)
        if isinstance(section, Training):
            shared(stage, section, count)
    for option, stage in (("--only", only), ("--from", start)):
        if stage is not None and stage not in stages:
            known = "is left out of this recipe" if stage in STAGES else "does not exist"
            raise StageError(f"{option} {stage}: this stage {known}; its stages are {', '.join(stages)}")
    if only is not None and start is not None:
        raise StageError("--only and --from: give one of them, not both")

    chosen = [only] if only else stages
    kept = stages[: stages.index(start)] if start else stages
    todo = []
    for stage in stages:
        state = context.state(stage) if stage in kept else None
        if state is not None and state["input_hash"] != context.input_hash(stage):
            raise StageError(
                f"{context.directory}: holds stage {stage} of another recipe ({_difference(context)}); "
                f"choose another --out, or --from {stage} to redo it from there"
            )
        finished = state is not None and state["status"] == "done"
        if stage not in chosen:
            if not finished and only in stages[stages.index(stage) :]:
                raise StageError(
                    f"--only {only}: needs stage {stage} first, which is not finished in {context.directory}"
                )
        elif finished:
            context.console.print(f"[bold]{stage}[/bold]  finished before, skipped")
        else:
            if state is not None and not resume:
                raise StageError(
                    f"{context.directory}: stage {stage} was interrupted; "
                    f"--resume goes on with it, --from {stage} starts it again"
                )
            todo.append(stage)
    if "transfer" in todo and (why := context.recipe.transfer.misplaced(count)):
        raise StageError(f"transfer.{why}")
    return todo


def _difference(context: Context) -> str:
    """The fields in which the directory's recipe is another one."""
    old = _flat(yaml.safe_load((context.directory / RESOLVED).read_text("utf-8")))
    new = _flat(yaml.safe_load(dump_recipe(context.recipe)))
    changed = [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key != "output"
    ]
    return "; ".join(changed) or "its input files changed"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {name: x for key, item in items for name, x in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}


