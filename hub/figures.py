"""What a run has measured, as figures for its report and its model card.

Each function of `FIGURES` draws the metrics of a run's stages (stage -> what its `state.json` holds), or returns None
where that was not measured. Colours have names, so that a page can put others in their place on a dark background.
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from math import ceil

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from linearize.hub.measured import TEACHER, TUNED_TEACHER, converted, measured_with
from linearize.layers.draft import COPY

# name -> on a light and on a dark background; each 4.5:1 or more against it, the grid aside.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "grid": ("#d8dee4", "#30363d"),
    "blue": ("#0969da", "#58a6ff"),
    "orange": ("#b54708", "#f0883e"),
    "green": ("#1a7f37", "#3fb950"),
    "purple": ("#8250df", "#bc8cff"),
    "pink": ("#bf3989", "#f778ba"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
OTHERS = ("green", "purple", "pink")
# Of images, whose colours are the same on both backgrounds.
EMPTY = "#8c959f"
DEPTH = LinearSegmentedColormap.from_list("depth", ["#3b7dd8", "#8f63c9", "#d0497d", "#d9622b"])
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "text.color": LIGHT["ink"],
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
}
# Inches: text of 10 points can still be read where a telephone shows all of the width.
WIDTH, PANEL = 4.6, 2.3
# Points of a curve; there may be a hundred times as many steps.
POINTS = 200
MARKERS = "osD^vP"


def _figure(panels: int, height: float = PANEL, **axes) -> tuple[Figure, list[Axes]]:
    """So many axes below each other."""
    figure = Figure(figsize=(WIDTH, panels * height), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False, **axes)[:, 0])


def _legend(figure: Figure, axes: Iterable[Axes], **how) -> None:
    """Below the figure, one entry a line, as names are long."""
    entries = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.set_figheight(figure.get_figheight() + 0.21 * ceil(len(entries) / how.get("ncols", 1)) + 0.1)
    figure.legend(entries.values(), entries, loc="outside lower left", **how)


def _styles(results: dict) -> dict[str, dict]:
    """Model -> how its lines look in every figure; by marker as well as by colour."""
    last, others = converted(results), iter(OTHERS * len(results["models"]))
    looks = {}
    for marker, name in enumerate(results["models"]):
        if name in (TEACHER, TUNED_TEACHER):
            look = {"color": LIGHT["ink"], "linestyle": "-" if name == TEACHER else "--", "label": name}
        elif name == last:
            look = {"color": LIGHT["blue"], "label": f"converted ({name})", "linewidth": 2.4, "zorder": 3}
        else:
            colour = "orange" if name.endswith("untrained") else next(others)
            look = {"color": LIGHT[colour], "label": name}
        looks[name] = look | {"marker": MARKERS[marker % len(MARKERS)]}
    return looks


def _lengths(axes: Axes, values: Iterable[float]) -> None:
    """Ticks of a logarithmic axis at these numbers of tokens, the largest and every second, fourth .. one before it."""
    values = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown := values[:: -ceil(len(values) / 7)], [_tokens(value) for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _tokens(count: float) -> str:
    return f"{count / 1024:g}k" if count >= 1024 and count % 512 == 0 else f"{count:g}"


def _scale(axes: Axes, from_zero: bool = False) -> None:
    """Logarithmic where numbers differ by much; ticks are plain numbers. `from_zero`: otherwise 0 is seen."""
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if values.min() > 0 and values.max() > 4 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif from_zero:
        axes.set_ylim(0, 1.08 * values.max())


def means(values: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Where values are more than `points`: the middle (counted from 1) and the mean of as many equal spans of them."""
    spans = np.array_split(np.asarray(values, float), min(points, len(values)))
    ends = np.cumsum([len(span) for span in spans])
    middles = [end - (len(span) - 1) / 2 for span, end in zip(spans, ends, strict=True)]
    return middles, [float(span.mean()) for span in spans]


def _loss(metrics: dict, stage: str) -> Figure | None:
    values = metrics.get(stage, {}).get("loss")
    if not values:
        return None
    figure, (axes,) = _figure(1)
    axes.plot(*means(values), color=LIGHT["blue"], label=f"loss of {stage}", marker="o" if len(values) < 3 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


def transfer_loss(metrics: dict) -> Figure | None:
    return _loss(metrics, "transfer")


def finetune_loss(metrics: dict) -> Figure | None:
    return _loss(metrics, "finetune")


def medusa_loss(metrics: dict) -> Figure | None:
    return _loss(metrics, "medusa")


def layer_losses(metrics: dict) -> Figure | None:
    """A curve per layer, coloured by its depth."""
    curves = {layer: values for layer, values in metrics.get("transfer", {}).get("loss_of_layer", {}).items() if values}
    if not curves:
        return None
    # A layer that stopped before the others has fewer spans of the same length.
    span = len(metrics["transfer"]["loss"]) / max(map(len, curves.values()))
    figure, (axes,) = _figure(1, 3.0)
    scale = matplotlib.colors.Normalize(0, max(map(int, curves)) or 1)
    for layer, values in curves.items():
        middle = [(i + 0.5) * span + 0.5 for i in range(len(values))]
        axes.plot(middle, values, color=DEPTH(scale(int(layer))), linewidth=1.1, label=f"layer {layer}")
    axes.set(xlabel="step", ylabel="loss of a layer")
    _scale(axes)
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(scale, DEPTH), ax=axes, label="layer", aspect=30)
    bar.locator = MaxNLocator("auto", integer=True)
    bar.outline.set_visible(False)
    return figure


def _heatmaps(maps: dict[str, dict[str, list]], label: str, ceiling: float, percent: bool = False) -> Figure:
    """Layers x heads: title -> layer -> a figure per head, None where the head has none, which is left grey."""
    layers = list(dict.fromkeys(layer for rows in maps.values() for layer in rows))
    heads = max(len(row) for rows in maps.values() for row in rows.values())
    grids = {}
    for title, rows in maps.items():
        grids[title] = np.full((len(layers), heads), np.nan)
        for layer, row in rows.items():
            grids[title][layers.index(layer), : len(row)] = [np.nan if value is None else value for value in row]
    largest = max((float(np.nanmax(grid)) for grid in grids.values() if np.isfinite(grid).any()), default=1.0)
    figure = Figure(figsize=(WIDTH, min(6.0, max(2.0, 0.11 * len(layers) + 0.9))), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axes, (title, grid) in zip(panels, grids.items(), strict=True):
        shown = matplotlib.colormaps["viridis"].with_extremes(bad=EMPTY)
        image = axes.imshow(
            grid, cmap=shown, vmin=0, vmax=min(ceiling, largest), aspect="auto", interpolation="none", label=title
        )
        axes.grid(False)
        axes.set(title=title, xlabel="query head", ylabel="" if axes is not panels[0] else "layer")
        axes.set_yticks(range(0, len(layers), every := ceil(len(layers) / 12)), layers[::every])
        axes.xaxis.set_major_locator(MaxNLocator(12 // len(maps), integer=True))
    bar = figure.colorbar(
        image, ax=panels, label=label, aspect=30, extend="max" if largest > ceiling else "neither",
        format=PercentFormatter(1, 0 if largest > 0.05 else 1) if percent else None,
    )  # fmt: skip
    bar.outline.set_visible(False)
    return figure


def transfer_error(metrics: dict) -> Figure | None:
    rows = metrics.get("transfer", {}).get("error_of_head")
    return _heatmaps({"after transfer": rows}, "relative squared error", 1.0) if rows else None


def far_attention(metrics: dict) -> Figure | None:
    """The share of attention on what is beyond the window, of the converted model's heads and of the teacher's."""
    results = metrics.get("evaluate")
    if results is None:
        return None
    found = next(iter(measured_with(results, "far_mass", lambda it: it["layers"]).values()), {})
    titles = {converted(results): "converted", TEACHER: "teacher"}
    maps = {title: found[name] for name, title in titles.items() if name in found}
    return _heatmaps(maps, "share of attention", 1.0, percent=True) if maps else None


def perplexity(metrics: dict) -> Figure | None:
    """By position, in the longest windows."""
    sizes = _sizes(metrics, "text", lambda it: _ranges(it["by_position"]))
    if not sizes:
        return None
    size = max(sizes, key=int)
    figure, (axes,) = _figure(1, 2.8)
    looks = _styles(metrics["evaluate"])
    for name, values in sizes[size].items():
        axes.plot(*zip(*values.items(), strict=True), **looks[name])
    _lengths(axes, (end for values in sizes[size].values() for end in values))
    _scale(axes)
    axes.set(xlabel=f"position up to, in windows of {size} tokens", ylabel="perplexity")
    _legend(figure, [axes])
    return figure


def recall(metrics: dict) -> Figure | None:
    sizes = _sizes(metrics, "recall", lambda it: _ranges(it["by_distance"]))
    return _shares(metrics, sizes, "{} pairs", "tokens up to the pair", "values recalled", _lengths)


def passkey(metrics: dict) -> Figure | None:
    sizes = _sizes(metrics, "passkey", lambda it: {float(depth): share for depth, share in it["by_depth"].items()})
    return _shares(metrics, sizes, "{} tokens", "depth of the key (0 is the beginning)", "keys found")


def _shares(
    metrics: dict, sizes: dict, title: str, xlabel: str, ylabel: str, ticks: Callable | None = None
) -> Figure | None:
    """Axes for each size, a line per model."""
    if not sizes:
        return None
    looks = _styles(metrics["evaluate"])
    figure, panels = _figure(len(sizes))
    for axes, (size, models) in zip(panels, sizes.items(), strict=True):
        for name, values in models.items():
            axes.plot(*zip(*values.items(), strict=True), **looks[name])
        axes.set(title=title.format(size), xlabel=xlabel, ylabel=ylabel, ylim=(-0.04, 1.04))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        if ticks is not None:
            ticks(axes, (place for values in models.values() for place in values))
    _legend(figure, panels)
    return figure


def _sizes(metrics: dict, measure: str, figure: Callable[[dict], dict]) -> dict:
    results = metrics.get("evaluate")
    return {} if results is None else measured_with(results, measure, figure)


def _ranges(values: dict[str, float | None]) -> dict[int, float]:
    """`"64-128"` -> figure as end of the range -> figure, where there is one that can be drawn."""
    return {int(name.split("-")[1]): x for name, x in values.items() if x is not None and np.isfinite(x)}


def speed(metrics: dict) -> Figure | None:
    panels = {"prefill_seconds": ("whole prompt", 1, "s"), "decode_seconds": ("one more token", 1e3, "ms")}
    return _by_context(metrics, panels)


def memory(metrics: dict) -> Figure | None:
    return _by_context(metrics, {"cache_bytes": ("cache of one sequence", 2**-20, "MiB")})


def _by_context(metrics: dict, panels: dict[str, tuple[str, float, str]]) -> Figure | None:
    """Axes for each figure of measure speed: name -> (title, factor, unit)."""
    sizes = _sizes(metrics, "speed", dict)
    measured = {name for models in sizes.values() for figures in models.values() for name in figures}
    panels = {name: panel for name, panel in panels.items() if name in measured}
    if not panels:
        return None
    looks = _styles(metrics["evaluate"])
    figure, drawn = _figure(len(panels), 2.5)
    for axes, (figure_name, (title, factor, unit)) in zip(drawn, panels.items(), strict=True):
        for model, look in looks.items():
            points = {
                int(size): by[model][figure_name] * factor
                for size, by in sizes.items()
                if by.get(model, {}).get(figure_name) is not None
            }
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), **look)
        _lengths(axes, map(int, sizes))
        axes.set(title=title, xlabel="tokens of context", ylabel=unit)
        _scale(axes, from_zero=True)
    _legend(figure, drawn)
    return figure


def guesses(metrics: dict) -> Figure | None:
    """How often the heads, and what is copied, are right about the token so many places ahead."""
    heads = metrics.get("medusa", {}).get("head_accuracy")
    if not heads:
        return None
    figure, (axes,) = _figure(1)
    ahead = range(2, len(heads) + 2)
    axes.plot(ahead, [it["top1"] for it in heads], "o-", color=LIGHT["blue"], label="a head's first guess")
    axes.plot(ahead, [it["top5"] for it in heads], "s--", color=LIGHT["blue"], label="one of its first five")
    if copied := metrics["medusa"].get("copy_accuracy"):
        places = range(2, len(copied) + 2)
        axes.plot(places, copied, "D-", color=LIGHT["orange"], label="copied from where the text said the same")
    axes.set(xlabel="token so many places ahead", ylabel="right", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend(figure, [axes])
    return figure


def draft_tree(metrics: dict) -> Figure | None:
    """The tree of guesses for one sequence: places ahead from left to right, the likeliest guesses on top."""
    paths = [tuple(path) for path in metrics.get("medusa", {}).get("tree", [])]
    if not paths:
        return None
    nodes = [(), *paths]
    children = {node: sorted(path for path in paths if path[:-1] == node) for node in nodes}
    # A leaf has a line of its own, and others are in the middle of their children.
    height, line = {}, 0
    for node in sorted(nodes):
        if not children[node]:
            height[node], line = line, line + 1
    for node in sorted(nodes, key=len, reverse=True):
        if children[node]:
            height[node] = (height[children[node][0]] + height[children[node][-1]]) / 2
    figure, (axes,) = _figure(1, min(6.0, max(1.6, 0.15 * line + 0.6)))
    for path in paths:
        ends = [len(path), len(path) + 1]
        axes.plot(ends, [height[path[:-1]], height[path]], color=LIGHT["muted"], linewidth=0.8, zorder=1)
    kinds = {
        "next token, known": (lambda path: not path, "ink", "o"),
        "a head's guess": (lambda path: path and path[-1] != COPY, "blue", "o"),
        "copied": (lambda path: path and path[-1] == COPY, "orange", "D"),
    }
    for label, (is_one, colour, marker) in kinds.items():
        chosen = [node for node in nodes if is_one(node)]
        if chosen:
            places = [len(node) + 1 for node in chosen], [height[node] for node in chosen]
            axes.scatter(*places, color=LIGHT[colour], marker=marker, s=22, zorder=2, label=f"{label} ({len(chosen)})")
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    axes.set(xlabel="places ahead")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend(figure, [axes])
    return figure


FIGURES: dict[str, Callable[[dict], Figure | None]] = {
    function.__name__: function
    for function in (
        transfer_loss, layer_losses, finetune_loss, medusa_loss, transfer_error, far_attention, perplexity, recall,
        passkey, speed, memory, guesses, draft_tree,
    )
}  # fmt: skip


# What drawing metrics ends in that are not as a stage writes them.
ERRORS = (KeyError, IndexError, TypeError, ValueError, AttributeError)


def drawings(metrics: dict, names: Iterable[str] = tuple(FIGURES)) -> tuple[dict[str, Figure], dict[str, str]]:
    """The figures of these names of what was measured, and why others could not be drawn."""
    figures, problems = {}, {}
    for name in names:
        try:
            with matplotlib.rc_context(STYLE):
                figure = FIGURES[name](metrics)
        except ERRORS as error:
            problems[name] = f"{type(error).__name__}: {error}"
        else:
            if figure is not None:
                figures[name] = figure
    return figures, problems


def png(figure: Figure) -> bytes:
    """On white, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """An element for HTML pages, the same text for the same figure. Its colours are variables (`--ink`, ..), its ids
    begin with `name`, and its size is the page's."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    for colour, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{colour})")
    return text


def describe(figure: Figure) -> str:
    """What a figure shows, in words, for those who do not see it."""
    told = []
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            continue
        name = axes.get_title(loc="left") or axes.get_ylabel() or axes.get_xlabel()
        parts = [f"{line.get_label()} {_span(line.get_ydata())}" for line in axes.lines if line.get_label()[0] != "_"]
        parts += [f"from {np.nanmin(grid):.3g} to {np.nanmax(grid):.3g}" for grid in _finite_images(axes)]
        parts += [dots.get_label() for dots in axes.collections if dots.get_label()[0] != "_"]
        told.append(f"{name} by {axes.get_xlabel()}: {'; '.join(parts)}")
    return ". ".join(told)


def _span(values) -> str:
    return f"{values[0]:.3g}" if len(values) == 1 else f"from {values[0]:.3g} to {values[-1]:.3g}"


def _finite_images(axes: Axes) -> list[np.ndarray]:
    grids = [np.ma.filled(image.get_array(), np.nan) for image in axes.images]
    return [grid for grid in grids if np.isfinite(grid).any()]
