"""Figures hold what was measured: their lines, points and cells, from made-up metrics."""

import re

import matplotlib
import numpy as np
import pytest

from linearize.hub.figures import COLOURS, FIGURES, LIGHT, POINTS, describe, drawings, means, png, svg
from linearize.hub.measured import TEACHER, TUNED_TEACHER

from .measured import HEADS, LAYERS, WINDOW, full_metrics

DRAWN = [TEACHER, TUNED_TEACHER, WINDOW, "converted (after finetune)"]


@pytest.fixture(scope="module")
def drawn():
    found, problems = drawings(full_metrics())
    assert not problems
    return found


def points(axes) -> dict[str, list]:
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}


def cells(axes) -> np.ndarray:
    (image,) = axes.images
    return np.ma.filled(image.get_array(), np.nan)


def test_everything_is_drawn_that_was_measured_and_nothing_else(drawn):
    assert drawn.keys() == FIGURES.keys()
    assert drawings({}) == ({}, {})
    metrics = full_metrics()
    for figures_of in metrics["evaluate"]["models"].values():
        figures_of.pop("speed", None)
        figures_of.pop("far_mass", None)
    del metrics["transfer"]["error_of_head"], metrics["transfer"]["loss_of_layer"], metrics["medusa"]
    missing = {"speed", "memory", "far_attention"}
    missing |= {"transfer_error", "layer_losses", "medusa_loss", "guesses", "draft_tree"}
    assert FIGURES.keys() - drawings(metrics)[0].keys() == missing


def test_loss_has_a_point_per_step_or_means_over_spans_of_them(drawn):
    metrics = full_metrics()
    (line,) = drawn["finetune_loss"].axes[0].lines
    assert line.get_xydata().tolist() == [[1, 3.0], [2, 2.5], [3, 2.4]]
    (line,) = drawn["transfer_loss"].axes[0].lines
    assert len(line.get_xdata()) == POINTS
    middles, values = means(metrics["transfer"]["loss"][:450])
    # Spans of three and of two steps, none left out.
    assert middles[:2] == [2, 5] and middles[-1] == 449.5
    weights = np.array([3] * 50 + [2] * 150)
    assert np.dot(weights, values) / 450 == pytest.approx(np.mean(metrics["transfer"]["loss"][:450]))


def test_layers_have_a_curve_each_over_the_steps_in_which_they_learned():
    metrics = full_metrics()
    metrics["transfer"]["loss_of_layer"]["0"] = metrics["transfer"]["loss_of_layer"]["0"][:20]
    axes, bar = drawings(metrics, ["layer_losses"])[0]["layer_losses"].axes
    curves = points(axes)
    assert list(curves) == [f"layer {layer}" for layer in range(LAYERS)]
    steps, losses = zip(*curves["layer 2"], strict=True)
    # 100 means over 5 of 500 steps.
    assert steps[:2] == (3, 8) and steps[-1] == 498
    assert [step for step, _ in curves["layer 0"]] == [*steps[:20]]
    assert list(losses) == metrics["transfer"]["loss_of_layer"]["2"]
    assert bar.get_ylabel() == "layer"


def test_cells_are_layers_by_heads_and_kept_heads_have_none(drawn):
    error = cells(drawn["transfer_error"].axes[0])
    assert error.shape == (LAYERS, HEADS)
    assert error[2, 3] == pytest.approx(0.05 * 3 * 4)
    converted, teacher, _ = drawn["far_attention"].axes
    assert (converted.get_title(loc="left"), teacher.get_title(loc="left")) == ("converted", "teacher")
    assert np.argwhere(np.isnan(cells(converted))).tolist() == [[1, 3]]
    assert not np.isnan(cells(teacher)).any()
    # One scale for both, or they could not be compared.
    assert converted.images[0].get_clim() == teacher.images[0].get_clim() == (0, pytest.approx(0.3))


def test_perplexity_has_a_line_for_who_was_measured_in_the_longest_windows(drawn):
    lines = points(drawn["perplexity"].axes[0])
    assert list(lines) == DRAWN
    assert [place for place, _ in lines[TEACHER]] == [64, 128, 256, 512, 1024]
    expected = full_metrics()["evaluate"]["models"][TEACHER]["text"]["1024"]["by_position"].values()
    assert [value for _, value in lines[TEACHER]] == list(expected)


def test_shares_have_axes_for_each_size(drawn):
    short, long = drawn["passkey"].axes
    assert [axes.get_title(loc="left") for axes in (short, long)] == ["1024 tokens", "4096 tokens"]
    assert points(short)[TEACHER] == [(depth, pytest.approx(0.99 * depth)) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)]
    (axes,) = drawn["recall"].axes
    assert points(axes)["converted (after finetune)"] == [(64, 0.42), (128, 0.21), (256, 0.42 / 3)]


def test_speed_and_memory_are_in_readable_units(drawn):
    prefill, decode = drawn["speed"].axes
    assert (prefill.get_ylabel(), decode.get_ylabel()) == ("s", "ms")
    assert points(decode)["converted (after finetune)"] == [(512, 10.0), (1024, 10.0), (2048, 10.0)]
    (memory,) = drawn["memory"].axes
    assert [megabytes for _, megabytes in points(memory)[WINDOW]] == [1.0, 1.0, 1.0]
    assert list(points(memory)) == DRAWN
    # From 1 to 21 MiB, and from 10 to 10.2 ms.
    assert (memory.get_yscale(), decode.get_yscale()) == ("log", "linear")
    assert 0.5 < memory.get_ylim()[0] < 1 and 21 < memory.get_ylim()[1] < 50
    assert decode.get_ylim()[0] == 0 and 10.2 < decode.get_ylim()[1] < 12


def test_tree_has_its_nodes_by_where_their_guess_is_from(drawn):
    (axes,) = drawn["draft_tree"].axes
    groups = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert list(groups) == ["next token, known (1)", "a head's guess (1)", "copied (2)"]
    # Leaves [0, 10] and [10] have a line each, and what they come from is in the middle.
    assert groups["next token, known (1)"] == [[1, 0.5]]
    assert groups["copied (2)"] == [[3, 0], [2, 1]]
    assert len(axes.lines) == 3
    heads, five, copied = drawn["guesses"].axes[0].lines
    assert [len(line.get_xdata()) for line in (heads, five, copied)] == [2, 2, 3]
    assert list(heads.get_ydata()) == [0.4, 0.2]


def test_what_is_not_finite_is_not_a_point():
    metrics = full_metrics()
    metrics["evaluate"]["models"][WINDOW]["text"]["1024"]["by_position"]["512-1024"] = float("inf")
    metrics["evaluate"]["models"][WINDOW]["text"]["1024"]["by_position"]["0-64"] = None
    found, problems = drawings(metrics, ["perplexity"])
    assert not problems
    assert [place for place, _ in points(found["perplexity"].axes[0])[WINDOW]] == [128, 256, 512]


def test_a_figure_that_cannot_be_drawn_is_named_and_the_others_are_there():
    metrics = full_metrics()
    metrics["transfer"]["error_of_head"] = {"0": "high"}
    found, problems = drawings(metrics)
    assert problems.keys() == {"transfer_error"} and problems["transfer_error"].startswith("ValueError: ")
    assert found.keys() == FIGURES.keys() - {"transfer_error"}


@pytest.mark.parametrize("name", FIGURES)
def test_elements_are_the_same_each_time_and_fit_into_a_page(name, drawn):
    again, _ = drawings(full_metrics(), [name])
    element = svg(drawn[name], name)
    assert element == svg(again[name], name)
    assert png(drawn[name]) == png(again[name])
    assert element.startswith("<svg ") and not re.search(r"<svg[^>]* (width|height)=", element)
    assert "<style" not in element and "<metadata" not in element
    # Ids are this figure's own, and what refers to one finds it.
    ids = set(re.findall(r'\bid="([^"]*)"', element))
    assert ids and all(identifier.startswith(f"{name}-") for identifier in ids)
    assert set(re.findall(r'href="#([^"]*)"', element)) | set(re.findall(r"url\(#([^)]*)\)", element)) <= ids
    # The page has the colours, and letters stay letters.
    assert not any(light in element for light in LIGHT.values())
    assert set(re.findall(r"var\(--(\w+)\)", element)) <= COLOURS.keys()
    assert "<text" in element
    assert len(describe(drawn[name])) > 20


def test_drawing_leaves_no_trace_in_the_settings_of_others():
    before = dict(matplotlib.rcParams)
    drawings(full_metrics(), ["perplexity"])
    assert dict(matplotlib.rcParams) == before


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", [name for name in COLOURS if name != "grid"])
def test_colours_can_be_read_on_both_backgrounds(name):
    """4.5:1, as WCAG 2.2 wants it for text; the cards are a little off the page's white and black."""
    for colour, background in zip(COLOURS[name], ("#f6f8fa", "#151b23"), strict=True):
        lighter, darker = sorted((_luminance(colour), _luminance(background)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (colour, background)
