# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Trains STELLAR and, as a reference, the same network with labels: the same scenes, views, steps and seeds.

    python examples/embedded_comparison.py                      # three seeds of both
    python examples/embedded_comparison.py --seeds 0 --max_steps 20 --num_train_scenes 256    # a try, in a minute

Writes stellar-SEED and supervised-SEED below --output_dir, measures them beside an untrained network and what needs no
training, and writes tables of means and deviations to results.md. The same command goes on where it was interrupted.
The supervised network is told which materials and shapes are in a scene, not where; it sees the views whole, where
STELLAR drops most of their patches.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Trainer, set_seed

from stellar_hf import (
    StellarConfig,
    StellarForImageClassification,
    StellarForPreTraining,
    StellarModel,
    StellarTrainer,
    StellarTrainingArguments,
)
from stellar_hf.cli.pretrain import make_parser, value_types
from stellar_hf.cli.recipes import read_recipe
from stellar_hf.data import StellarCollator, load_tabletop_scenes
from stellar_hf.evaluation import (
    METRICS,
    ResultFile,
    RunSettings,
    build_tables,
    evaluate_models,
    format_markdown,
    load_embedded_data,
    load_subject,
)
from stellar_hf.training import default_processor

NAMES = ("stellar", "supervised")
# What differs from the packaged recipe: nothing is made of maps here, since labels do not train them.
CONFIG = {
    "image_size": 64,
    "patch_size": 8,
    "num_sparse_tokens": 8,
    "localization_temperature": 0.06,
    "localization_compactness": 0.0,
    "refine_tokens": False,
}
VIEWS = {
    "global_size": None,
    "num_local_views": 1,
    "local_scale": [0.1, 0.4],
    "jitter_probability": 0.0,
    "blur_probability": 0.5,
}


class LabelledCollator(StellarCollator):
    """Also the labels of a batch: (B, materials + shapes), ones where the scene has such an object."""

    def __call__(self, scenes):
        labels = [torch.cat([present(scene["material"], 19), present(scene["shape"], 4)]) for scene in scenes]
        return {**super().__call__(scenes), "labels": torch.stack(labels)}


def present(classes, num_classes):
    known = [label for label in classes if label >= 0]  # -1 stands where a scene has fewer objects
    return torch.zeros(num_classes).index_fill(0, torch.tensor(known), 1.0)


class SupervisedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        views = self.args.views(model.config)(inputs["images"], inputs["image_sizes"])
        losses = []
        for pixel_values in (views["global_pixel_values"], views["local_pixel_values"]):
            labels = inputs["labels"].repeat_interleave(pixel_values.shape[1], dim=0)
            losses.append(model(pixel_values.flatten(0, 1), labels, interpolate_pos_encoding=True).loss)
        return sum(losses)


def with_untrained_localization(encoder, seed):
    """The encoder with the map of a fresh model: labels say nothing of where, and a classifier has none."""
    set_seed(seed)
    model = StellarModel(encoder.config)
    model.load_state_dict(encoder.state_dict(), strict=False)
    return model


def train(name, seed, args):
    """Trains one of the two, or goes on, or finds it done; returns its folder."""
    folder = Path(args.output_dir, f"{name}-{seed}")
    recipe = read_recipe("tabletop_scenes", types=value_types(make_parser()))
    config = {**recipe.pop("model_config"), **CONFIG}
    known = {field: value for field, value in recipe.items() if field in StellarTrainingArguments.__dataclass_fields__}
    changes = {"output_dir": folder, "seed": seed, "max_steps": args.max_steps}
    settings = StellarTrainingArguments(**{**known, **VIEWS, **changes})
    data = {"train_dataset": load_tabletop_scenes("train", args.num_train_scenes)}

    set_seed(seed)
    if name == "supervised":
        classes = {"num_labels": 23, "problem_type": "multi_label_classification"}
        model = StellarForImageClassification(StellarConfig(**config, **classes))
        trainer = SupervisedTrainer(model, settings, LabelledCollator(), **data)
    else:
        model = StellarForPreTraining(StellarConfig(**config))
        trainer = StellarTrainer(model, settings, **data)
    if not (folder / "model.safetensors").exists():
        trainer.train(resume_from_checkpoint=bool(list(folder.glob("checkpoint-*"))))
        if trainer.state.global_step < args.max_steps:
            sys.exit("Interrupted: repeat the command to go on.")
        if name == "supervised":
            model = with_untrained_localization(model.stellar, seed)
        default_processor(model).save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def measure(name, folder, seed, args):
    """Results of a model, by a name that all seeds share; those that are in results.json are not measured again."""
    return evaluate_models(
        [replace(load_subject(folder), name=name)],
        load_embedded_data(args.num_test_scenes, seed=seed),
        tasks=["knn", "linear", "objects", "disentanglement", "reconstruction"],
        settings=RunSettings(seed=seed, compression_images=0),
        results=ResultFile(Path(args.output_dir, "results.json")),
        baselines=name == "stellar",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="embedded-comparison", help="Where the models are written.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of weights and views.")
    parser.add_argument("--max_steps", type=int, default=300, help="Steps of each training.")
    parser.add_argument("--num_train_scenes", type=int, default=8000, help="Scenes of the train split.")
    parser.add_argument("--num_test_scenes", type=int, default=300, help="Scenes of the test split.")
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        for name in NAMES:
            results += measure(name, train(name, seed, args), seed, args)
    text = format_markdown(build_tables(results, METRICS))
    Path(args.output_dir, "results.md").write_text(text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
