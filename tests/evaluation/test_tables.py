# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Tables show models beside what was never trained, and say where a model is not better."""

import math

import pytest

from stellar_hf.evaluation import METRICS, Metric, Result, build_tables, format_markdown, format_models
from stellar_hf.evaluation.tables import bar_panels
from stellar_hf.visualization import plot_results

COLUMNS = {
    "knn": {
        "accuracy": Metric("top-1 %", 100, 1),
        "leak": Metric("leak", decimals=2, higher_is_better=False),
        "bits": Metric("bits", decimals=0, higher_is_better=None),
    }
}
IMAGES = {"resize": {"shortest_edge": 32}, "crop": {"height": 32, "width": 32}, "resampling": "bicubic"}


def result(model, metrics, kind="model", seed=0, task="knn", data="scenes", weights="abc"):
    model_protocol = {"class": "StellarModel", "weights": weights, "dtype": "float32"}
    protocol = {"data": data, "test_images": 10, "model": model_protocol, "images": IMAGES, "seed": seed}
    return Result(model, kind, task, protocol, metrics)


def cells(text):
    """The cells of every line of the tables in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_models_come_first_and_numbers_below_a_baseline_are_marked():
    results = [
        result("pixels", {"pooled": {"accuracy": 0.4, "leak": 0.3, "bits": 7}}, kind="baseline"),
        result("mine", {"cls": {"accuracy": 0.5, "leak": 0.6, "bits": 9}, "patches": {"accuracy": 0.4}}),
        result("mine, untrained", {"cls": {"accuracy": 0.1}}, kind="untrained"),
    ]
    text = format_markdown(build_tables(results, COLUMNS))
    assert cells(text) == [
        ["", "", "top-1 %", "leak", "bits"],
        ["---", "---", "---:", "---:", "---:"],
        ["**mine**", "cls", "50.0", "0.60 ↓", "9"],
        ["", "patches", "40.0 ↓", "–", "–"],
        ["mine, untrained", "cls", "10.0", "–", "–"],
        ["pixels", "pooled", "40.0", "0.30", "7"],
    ]
    assert "↓: not above the best baseline that was never trained." in text
    assert "test images 10; seed 0." in text


def test_nothing_is_marked_where_there_is_no_baseline():
    text = format_markdown(build_tables([result("mine", {"cls": {"accuracy": 0.0}})], COLUMNS))
    assert "↓" not in text


def test_what_uses_nothing_of_the_model_is_a_baseline():
    found = {"argmax of L": {"accuracy": 0.2}, "uniform L": {"accuracy": 0.3}}
    (table,) = build_tables([result("mine", found)], COLUMNS)
    assert [(row.variant, row.kind) for row in table.rows] == [("argmax of L", "model"), ("uniform L", "baseline")]
    assert table.rows[0].below == {"accuracy"}


def test_a_number_is_compared_with_columns_beside_it():
    columns = {"knn": {"psnr": Metric("PSNR", decimals=0, beside=("jpeg",)), "jpeg": Metric("JPEG", decimals=0)}}
    found = {"many bits": {"psnr": 26, "jpeg": 30}, "few bits": {"psnr": 20, "jpeg": 18}, "none": {"psnr": 10}}
    text = format_markdown(build_tables([result("mine", found)], columns))
    assert [row[2:] for row in cells(text)[2:]] == [["26 ↓", "30"], ["20", "18"], ["10", "–"]]


def test_seeds_become_a_mean_and_a_deviation():
    results = [result("mine", {"cls": {"accuracy": value}}, seed=seed) for seed, value in enumerate((0.4, 0.5, 0.6))]
    text = format_markdown(build_tables(results, COLUMNS))
    assert cells(text)[2] == ["**mine**", "cls", "50.0 ± 10.0"]
    assert "seeds 0, 1, 2: mean and standard deviation." in text


def test_what_was_measured_on_other_data_is_another_table():
    results = [result("mine", {"cls": {"accuracy": 0.5}}, data=data) for data in ("scenes", "photographs")]
    text = format_markdown(build_tables(results, COLUMNS))
    assert text.count("### knn") == 2 and "### knn, photographs" in text


def test_undefined_numbers_and_tasks_without_columns():
    found = {"cls": {"accuracy": math.nan, "other_number": 1 / 3}}
    text = format_markdown(build_tables([result("mine", found), result("mine", found, task="new")], COLUMNS))
    assert cells(text)[0] == ["", "", "top-1 %"] and cells(text)[2] == ["**mine**", "cls", "–"]
    assert cells(text)[3] == ["", "", "accuracy", "other number"] and cells(text)[5][2:] == ["–", "0.333"]


def test_models_are_described_once():
    results = [result("mine", {"cls": {"accuracy": 0.5}}, task=task) for task in ("knn", "linear")]
    assert format_models(results) == (
        "- **mine**: StellarModel, weights abc, float32; images: resize shortest edge 32; crop height 32, width 32; "
        "resampling bicubic"
    )


def test_every_task_has_columns():
    assert set(METRICS) == {
        *("knn", "linear", "segmentation", "reconstruction", "objects", "disentanglement", "retrieval")
    }
    assert all(columns for columns in METRICS.values())


def test_figure_has_a_panel_for_each_task_with_a_bar_for_each_row():
    results = [
        result("mine", {"cls": {"accuracy": 0.5}, "patches": {"accuracy": math.nan}}),
        result("pixels", {"pooled": {"accuracy": 0.4}}, kind="baseline"),
        result("mine", {"cls": {"accuracy": 0.7}}, task="linear"),
    ]
    panels = bar_panels(build_tables(results, {**COLUMNS, "linear": COLUMNS["knn"]}))
    figure = plot_results(panels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["knn: top-1 %", "linear: top-1 %"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [50, 40]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["mine, cls", "pixels, pooled"]
    with pytest.raises(ValueError, match="no panel"):
        plot_results([])


def test_a_number_that_is_infinite_for_a_seed_has_no_deviation():
    results = [result("mine", {"cls": {"accuracy": 0.5, "bits": bits}}, seed=int(bits > 7)) for bits in (7, math.inf)]
    tables = build_tables(results, COLUMNS)
    assert cells(format_markdown(tables))[-1] == ["**mine**", "cls", "50.0 ± 0.0", "inf"]
    plot_results(bar_panels(tables))
