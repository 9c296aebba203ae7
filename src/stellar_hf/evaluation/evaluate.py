# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Evaluation of a STELLAR model on scenes whose objects are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..features import encode_images
from .baselines import TrainingFreeEncoder
from .disentanglement import SceneObjects, what_and_where
from .objects import object_scores, segmentations
from .reconstruction import tokens_and_psnr

if TYPE_CHECKING:
    import datasets

# Key of a result, two-line column title, factor to the shown unit, decimals.
TableColumn = tuple[str, tuple[str, str], float, int]
SCENE_COLUMNS: tuple[TableColumn, ...] = (
    ("foreground_ari", ("FG-ARI", "%"), 100, 1),
    ("mean_best_overlap", ("mBO", "%"), 100, 1),
    ("object_recall", ("found", "%"), 100, 1),
    ("own_material_knn", ("material", "%"), 100, 1),
    ("other_material_knn", ("other's", "%"), 100, 1),
    ("own_shape_linear", ("shape", "%"), 100, 1),
    ("token_position_r2", ("place", "S, R²"), 1, 2),
    ("map_position_r2", ("place", "L, R²"), 1, 2),
    ("psnr", ("PSNR", "dB"), 1, 1),
)


def evaluate_scenes(
    model: Any,
    processor: Any,
    train: datasets.Dataset,
    test: datasets.Dataset,
    *,
    num_neighbours: int = 20,
    min_area: int = 10,
    batch_size: int = 64,
    description: str = "evaluate",
    show_progress: bool = True,
) -> dict[str, float]:
    """Measures on scenes whose objects are known whether tokens lie on objects, and what they tell of them.

    Args:
        model: `StellarForPreTraining`, `StellarForImageReconstruction`, or a baseline with tokens and maps, such as
            `KMeansSegments`.
        processor: Its image processor, which must show it all of each image.
        train: Scenes to find neighbours in and to fit probes to, as [`load_tabletop_scenes`] makes them.
        test: Scenes to measure on.
        num_neighbours: k of kNN.
        min_area: Least number of visible pixels of an object that is asked for.
        batch_size: Images of a forward pass.
        description: Begins the titles of the progress bars.
        show_progress: Whether to show progress bars.

    Returns:
        - `foreground_ari`, `mean_best_overlap`, `object_recall`, `ari` and `corloc`: [`object_scores`] of the tokens
          whose maps are the largest, means over the test scenes;
        - `own_material_knn`, `own_shape_linear`, … and `other_material_knn`, …: what an object's token tells of the
          object itself and of the largest other one, accuracies of [`what_and_where`];
        - `token_position_r2` and `map_position_r2`: how well the object's place is told from its token S, and from the
          centroid of its map L (R²: 1 exactly, 0 not at all);
        - `own_material_chance`, …: the accuracies of always naming the most frequent class;
        - `psnr`: of the reconstructions in dB, with the pixel head.

    Raises:
        ValueError: If a dataset is empty or lacks a column, or training has fewer than two scenes.
    """
    encode = None if isinstance(model, TrainingFreeEncoder) else tokens_and_psnr
    features = [
        encode_images(
            model,
            scenes,
            processor,
            encode=encode,
            batch_size=batch_size,
            description=f"{description}, {name} scenes",
            show_progress=show_progress,
        )
        for name, scenes in (("train", train), ("test", test))
    ]
    objects = [
        SceneObjects.from_dataset(scenes, part.index) for scenes, part in zip((train, test), features, strict=True)
    ]
    known, measured = (cast("dict[str, Tensor]", part.tensors) for part in features)  # images of one size
    told = what_and_where(known, objects[0], measured, objects[1], min_area, num_neighbours)
    tokens, chance = told["sparse_tokens"], told["chance"]
    maps = {name: measured[name] for name in ("localization", "grid_size")}
    mask = objects[1].mask
    (segmentation,) = segmentations(maps, mask.shape[1:], num_segments=maps["localization"].shape[-1]).values()
    results = {name: values.nanmean().item() for name, values in object_scores(segmentation, mask, min_area).items()}
    results["token_position_r2"] = tokens.pop("position_r2")
    results["map_position_r2"] = told["localization"]["position_r2"]
    results |= tokens | {f"{name}_chance": accuracy for name, accuracy in chance.items()}
    if "psnr" in measured:
        results["psnr"] = measured["psnr"].mean().item()
    return results


def format_results_table(
    rows: Mapping[str, Mapping[str, float]], columns: Sequence[TableColumn] = SCENE_COLUMNS
) -> str:
    """Formats results as an aligned text table.

    Args:
        rows: Results by row name, such as `{"trained": evaluate_scenes(...), ...}`. Keys that are not columns of the
            table are left out.
        columns: Key, title in two lines, factor and decimals of each column; those of [`evaluate_scenes`] by default,
            which take 80 characters with row names of up to 11.

    Returns:
        The table without a final line break; missing values are shown as "–".
    """
    name_width = max((len(name) for name in rows), default=0)
    widths = [max(len("100.0"), *map(len, title)) for _, title, _, _ in columns]

    def line(name: str, cells: list[str]) -> str:
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([f"{name:<{name_width}}", *cells])

    titles = [line("", [title[row] for _, title, _, _ in columns]) for row in (0, 1)]
    body = [
        line(
            name,
            [
                f"{results[key] * factor:.{decimals}f}" if key in results else "–"
                for key, _, factor, decimals in columns
            ],
        )
        for name, results in rows.items()
    ]
    return "\n".join([*titles, "-" * len(titles[0]), *body])
