"""What stage evaluate measured, as tables for people; `convert/evaluate.py` says what the results hold."""

from collections.abc import Callable, Iterator
from heapq import nlargest

from rich.console import Group, RenderableType
from rich.table import Table

from linearize.hub.measured import TEACHER, TUNED_TEACHER, of_examples

TOP_HEADS = 5


def results_table(results: dict) -> Group:
    """The perplexity of everything beside the teachers', then a table for each further measure."""
    return Group(*_tables(results))


def _tables(results: dict) -> Iterator[RenderableType]:
    measured = [figures for group in ("models", "ablations") for figures in results[group].values()]
    if any("embedding" in figures for figures in measured):
        title = "cosine of mean hidden states to the teacher's, by length of the text (and of the 5% that are furthest)"
        yield _table(results, title, _cosines)
        return
    if any("classes" in figures or "answers" in figures for figures in measured):
        yield _table(results, "held-out examples", of_examples)
        return
    teachers = {"x teacher": TEACHER, "x finetuned teacher": TUNED_TEACHER}
    teachers = {title: results["models"][name]["text"] for title, name in teachers.items() if name in results["models"]}

    def beside_teachers(figures: dict) -> dict[str, str]:
        row = {}
        for length, text in figures["text"].items():
            tokens = results["tokens"][length]
            ratios = [f"{text['perplexity'] / teacher[length]['perplexity']:.2f}" for teacher in teachers.values()]
            beside = f" ({', '.join(ratios)})" if ratios else ""
            row[f"{length} ({tokens} tokens)"] = f"{text['perplexity']:.2f}{beside}"
        return row

    compared = f" ({', '.join(teachers)})" if teachers else ""
    yield _table(results, f"held-out perplexity by length{compared}", beside_teachers)

    everything = max(measured, key=len)
    longest = max(everything["text"], key=int)
    title = f"perplexity by position in windows of {longest}"
    yield _measure(results, "text", longest, title, lambda it: _numbers(it["by_position"]))
    share = everything["text"][longest]["far_share"]
    title = f"perplexity of tokens whose 3-gram was last seen beyond the attention window ({share:.1%}), and of others"
    yield _measure(
        results,
        "text",
        longest,
        title,
        lambda it: _numbers({"far repeats": it["far_repeats"], "other tokens": it["other_tokens"]}),
    )
    for size in everything.get("copying", {}):
        yield _measure(
            results,
            "copying",
            size,
            f"a text of {size} tokens said again",
            lambda it: {"accuracy": f"{it['accuracy']:.0%}", "perplexity": f"{it['perplexity']:.2f}"},
        )
    for size in everything.get("passkey", {}):
        title = f"pass keys found in {size} tokens, by depth"
        yield _measure(results, "passkey", size, title, lambda it: _shares(it["accuracy"], it["by_depth"]))
    for size in everything.get("recall", {}):
        title = f"values recalled from {size} pairs, by distance in tokens"
        yield _measure(results, "recall", size, title, lambda it: _shares(it["accuracy"], it["by_distance"]))
    for size in everything.get("speed", {}):
        yield _measure(results, "speed", size, f"one sequence after {size} tokens", _speed)
    for name, figures in results["models"].items():
        for share in figures.get("far_mass", {}).values():
            yield f"attention beyond the window, {name}: {_far(share)}"


def _cosines(figures: dict) -> dict[str, str]:
    measured = figures.get("embedding", {})
    return {length: f"{cosine['mean']:.3f} ({cosine['p5']:.3f})" for length, cosine in measured.items()}


def _far(share: dict) -> str:
    heads = [
        (value, f"{layer}.{head}")
        for layer, row in share["layers"].items()
        for head, value in enumerate(row)
        if value is not None
    ]
    top = ", ".join(f"{name} {value:.1%}" for value, name in nlargest(TOP_HEADS, heads))
    return f"{share['mean']:.1%} on average; most in (layer.head) {top}"


def _speed(measured: dict) -> dict[str, str]:
    return {
        "prefill": f"{measured['prefill_seconds']:.3g} s",
        "per token": f"{measured['decode_seconds'] * 1e3:.3g} ms",
        "cache": f"{measured['cache_bytes'] / 2**20:.1f} MiB",
    }


def _table(results: dict, title: str, cells: Callable[[dict], dict[str, str]]) -> Table:
    """A row for each model of which `cells` makes column -> cell out of its figures."""
    groups = [
        {name: row for name, figures in results[group].items() if (row := cells(figures))}
        for group in ("models", "ablations")
    ]
    columns = list(dict.fromkeys(column for rows in groups for row in rows.values() for column in row))
    table = Table("model", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for rows in groups:
        for name, row in rows.items():
            table.add_row(name, *(row.get(column, "") for column in columns))
        table.add_section()
    return table


def _measure(results: dict, measure: str, size: str, title: str, cells: Callable[[dict], dict[str, str]]) -> Table:
    """The same for the models that were measured so."""
    return _table(
        results, title, lambda figures: cells(figures[measure][size]) if size in figures.get(measure, {}) else {}
    )


def _numbers(values: dict[str, float | None]) -> dict[str, str]:
    return {name: "-" if value is None else f"{value:.2f}" for name, value in values.items()}


def _shares(whole: float, parts: dict[str, float]) -> dict[str, str]:
    return {"all": f"{whole:.0%}"} | {name: f"{value:.0%}" for name, value in parts.items()}
