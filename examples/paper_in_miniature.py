# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The paper's claims as controlled experiments: STELLAR, and the same with one thing changed, on tabletop scenes.

    python examples/paper_in_miniature.py                 # all variants, three seeds: about an hour
    python examples/paper_in_miniature.py --quick         # one seed, few steps: minutes, to see that it works
    python examples/paper_in_miniature.py --variants STELLAR "dense bottleneck" "no matching"

All variants of a seed start from the same weights and see the same images in the same order. Each run has a folder
with its weights and result.json, and the same command goes on where it was interrupted. After each run results.md (a
table, and what it says), results.csv and semantics_and_reconstruction.png are written anew.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import set_seed

from stellar_hf import StellarConfig, StellarForPreTraining, StellarModel, StellarTrainer, StellarTrainingArguments
from stellar_hf import evaluation as measures
from stellar_hf.cli.pretrain import make_parser, value_types
from stellar_hf.cli.recipes import read_recipe
from stellar_hf.data import load_tabletop_scenes
from stellar_hf.features import encode_images
from stellar_hf.objective_stellar import StellarObjective
from stellar_hf.training import default_processor

# The small recipe without what is beyond the paper, at the size of the scenes. A teacher sees the second of two global
# views. Its momentum is not the paper's 0.996, which would remember most of so short a training.
RECIPE = read_recipe("tabletop_scenes", types=value_types(make_parser()))
CONFIG = RECIPE.pop("model_config") | {"image_size": 64, "localization_compactness": 0.0, "refine_tokens": False}
NUM_PATCHES = (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2
TRAINING = {name: value for name, value in RECIPE.items() if name in StellarTrainingArguments.__dataclass_fields__}
TRAINING |= {"global_size": None, "num_global_views": 2, "num_local_views": 1, "local_size": 32, "save_steps": 100}
TRAINING |= {"local_scale": [0.1, 0.4], "teacher_momentum": 0.98, "per_device_train_batch_size": 32}
QUICK = {"seeds": [0], "max_steps": 20, "num_train_scenes": 1280, "num_test_scenes": 100}

PERCENT = {"factor": 100, "decimals": 1}
METRICS = {
    "image_knn": measures.Metric("image's label, kNN %", **PERCENT),
    "own_material_knn": measures.Metric("object's material from S, kNN %", **PERCENT),
    "psnr": measures.Metric("PSNR dB", decimals=2),
    "latent_values": measures.Metric("latent values", decimals=0),
    "foreground_ari": measures.Metric("FG-ARI %", **PERCENT),
    "mean_best_overlap": measures.Metric("mBO %", **PERCENT),
    "token_position_r2": measures.Metric("position from S, R²", decimals=2),
    "map_position_r2": measures.Metric("position from L, R²", decimals=2),
    "other_above_chance": measures.Metric("other object's material from S, kNN above chance, points", **PERCENT),
}


class SlotwiseObjective(StellarObjective):
    """Each token of a view has the target of its own slot."""

    def match(self, tokens, targets):
        num_views = len(tokens) // len(targets.tokens)
        return targets.expected.repeat_interleave(num_views, dim=0), tokens.new_ones(())


class NoMatching(StellarForPreTraining):
    objective_class = SlotwiseObjective


class DenseModel(StellarModel):
    """
    No factorization: D through a linear bottleneck is what the decoder and the heads read.

    In the terms of STELLAR each patch is a token, and L the identity. The bottleneck has r (d + N) / N values in each
    patch, in all as many as S and L have. The encoder is the same, but nothing reads what becomes of its r tokens.
    """

    def __init__(self, config):
        super().__init__(config, add_localization=False)
        self.localization = lambda dense, tokens, _: torch.eye(tokens.shape[1]).expand(len(tokens), -1, -1)
        width = config.num_sparse_tokens * (config.hidden_size + NUM_PATCHES) // NUM_PATCHES
        self.bottleneck = torch.nn.Sequential(
            torch.nn.Linear(config.hidden_size, width), torch.nn.Linear(width, config.hidden_size)
        )
        torch.nn.init.orthogonal_(self.bottleneck[0].weight)
        self.bottleneck[1].weight.data.copy_(self.bottleneck[0].weight.T)  # a projection, of the scale of D

    def encode(self, pixel_values, kept_patches=None, grid_size=None, needed="all", **kwargs):
        cls, dense_features, _ = super().split(super().encode(pixel_values, kept_patches, grid_size, **kwargs))
        return torch.cat([cls.unsqueeze(1), self.bottleneck(dense_features)], dim=1)

    def split(self, last_hidden_state):
        return last_hidden_state[:, 0], last_hidden_state[:, 1:], last_hidden_state[:, 1:]


class PooledObjective(StellarObjective):
    """The heads see r tokens of a dense latent: the means of r clusters of its patches."""

    def project(self, heads, cls, tokens):
        return super().project(heads, cls, pooled(tokens, self.config.num_sparse_tokens)[0])

    def terms(self, clean, targets, masked=None, local_cls=None):
        masked = masked and (masked[0], pooled(masked[1], self.config.num_sparse_tokens)[0])
        return super().terms(clean, targets, masked, local_cls)


class DenseForPreTraining(StellarForPreTraining):
    """Shows the means and maps of r clusters of the patches as S and L, in the place of the patches."""

    objective_class = PooledObjective

    def __init__(self, config):
        super().__init__(config)
        self.stellar = DenseModel(config)
        self.register_forward_hook(self.show_clusters)

    def show_clusters(self, _, inputs, output):
        output["sparse_tokens"], output["localization"] = pooled(output.sparse_tokens, self.config.num_sparse_tokens)


def pooled(patches, num_clusters):
    """Means (B, k, d) of the k-means clusters of patches (B, N, d), and the clusters as maps (B, N, k)."""
    labels = measures.kmeans(patches.detach().float(), num_clusters, num_restarts=1, max_iterations=10).labels
    maps = torch.eye(num_clusters)[labels]
    return measures.pooled_features(maps, patches), maps


@dataclass(frozen=True)
class Variant:
    """What is claimed of a change, with the sign of the difference from STELLAR in some metrics; and the change."""

    claim: str = ""
    expected: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    model: type = StellarForPreTraining
    no_gradient_to: tuple = ()  # what the reconstruction does not train, of what the decoder gets: S and L
    weights_of: str = ""  # of a variant whose training would be the same


S, L = 0, 1
LESS = {"image_knn": -1, "own_material_knn": -1}
LESS_OF_L = {"psnr": -1, "foreground_ari": -1}
NO_ALIGNMENT = {"koleo_weight": 0, "clustering_weight": 0, "masked_weight": 0, "local_weight": 0}
VARIANTS = {
    "STELLAR": Variant(),
    "alignment only": Variant("Alignment alone does not keep the image.", {"psnr": -1}, no_gradient_to=(S, L)),
    "reconstruction only": Variant("Reconstruction alone gives no semantics.", LESS, NO_ALIGNMENT),
    "dense bottleneck": Variant("A dense latent cannot do both.", LESS | {"psnr": -1}, model=DenseForPreTraining),
    "no matching": Variant("Tokens of two views have to be matched.", LESS, model=NoMatching),
    "no clustering": Variant("Clustering of the clean view gives semantics.", LESS, {"clustering_weight": 0}),
    "no KoLeo": Variant("Tokens have to be kept apart.", LESS, {"koleo_weight": 0}),
    "EMA teacher": Variant("From random weights a teacher helps.", {"image_knn": 1}, {"use_teacher": True}),
    "4 tokens": Variant("Fewer tokens keep less of the image.", {"psnr": -1}, {"num_sparse_tokens": 4}),
    "16 tokens": Variant("More tokens keep more of the image.", {"psnr": 1}, {"num_sparse_tokens": 16}),
    "L detached": Variant("Reconstruction is what trains L.", LESS_OF_L, no_gradient_to=(L,)),
    "compact maps": Variant(
        "Ours: they find objects.", {"foreground_ari": 1}, {"localization_compactness": 3.0}, weights_of="STELLAR"
    ),
    "untrained": Variant("Training helps in all of it.", LESS | LESS_OF_L | {"map_position_r2": -1}),
    "k-means segments": Variant("Ours: L beats colours and places.", {"own_material_knn": -1, "foreground_ari": -1}),
}


def make_model(variant, seed):
    """A model with STELLAR's weights of this seed wherever both have the same."""
    set_seed(seed)
    start = StellarForPreTraining(StellarConfig(**CONFIG)).state_dict()
    model = variant.model(StellarConfig(**CONFIG | variant.config))
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    same = {name: weight for name, weight in start.items() if shapes.get(name) == weight.shape}
    model.load_state_dict(same, strict=False)
    if model.teacher is not None:
        model.update_teacher(0.0)

    def cut(decoder, inputs):
        return tuple(each.detach() if i in variant.no_gradient_to else each for i, each in enumerate(inputs))

    model.decoder.register_forward_pre_hook(cut)
    return model


def measure(model, processor, num_scenes):
    """The metrics of a model or a baseline on the test split; what tells something was fitted to the train split."""
    data = measures.load_embedded_data(num_scenes, tasks=["knn", "disentanglement"]).splits
    single, several = ((data[task].train, data[task].test) for task in ("knn", "disentanglement"))
    metrics = measures.evaluate_scenes(model, processor, *several, show_progress=False)
    metrics["other_above_chance"] = metrics["other_material_knn"] - metrics["other_material_chance"]
    images = [encode_images(model, part, processor, show_progress=False).pooler_output for part in single]
    labels = [torch.tensor(part["label"][:]) for part in single]
    num_neighbours = min(20, len(labels[0]))
    metrics["image_knn"] = measures.knn_accuracy(images[0], labels[0], images[1], labels[1], k=num_neighbours)
    if isinstance(model, StellarForPreTraining):  # S and L; a dense latent has as many
        metrics["latent_values"] = model.config.num_sparse_tokens * (model.config.hidden_size + NUM_PATCHES)
    return metrics


def report(results, settings, output):
    """Writes the table, what it says, and the figure of what is there."""
    frame = pd.DataFrame(results).set_index(["variant", "seed"]).reindex(columns=list(METRICS))
    groups = frame.groupby("variant", sort=False)
    table = groups.agg(["mean", "std"])
    table.set_axis(map("_".join, table.columns), axis="columns").to_csv(output / "results.csv")
    plot(groups.mean(), groups.std()).savefig(output / "semantics_and_reconstruction.png")
    rows = [["", *(metric.title for metric in METRICS.values())], ["---", *["---:"] * len(METRICS)]]
    rows += [[name, *(text(metric, group[metric]) for metric in METRICS)] for name, group in groups]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    seeds = ", ".join(map(str, frame.index.unique("seed")))
    lines += ["", f"*{settings}; seeds {seeds}: mean and standard deviation.*", "", "Differences from STELLAR:", ""]
    lines += [check_claim(name, group.loc[name] - frame.loc["STELLAR"]) for name, group in groups][1:]
    (output / "results.md").write_text("\n".join(lines) + "\n")


def text(metric, values):
    return METRICS[metric].text(values.mean(), None if len(values) < 2 else values.std())


def check_claim(name, differences):
    """A sentence: the claim of a variant, and whether its differences from STELLAR, seed by seed, agree with it."""
    found = []
    for metric, sign in VARIANTS[name].expected.items():
        each = differences[metric].dropna()
        verdict = "as claimed" if each.mean() * sign > 0 else "against the claim"
        if len(each) < 2 or (each > 0).nunique() > 1 or abs(each.mean()) <= each.std():
            verdict = "not clear"
        found.append(f"{METRICS[metric].title} {text(metric, each)} ({verdict})")
    return f"- **{name}.** {VARIANTS[name].claim} {', '.join(found)}."


def plot(mean, std):
    """Semantics against reconstruction: a point with its deviations for each variant that reconstructs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots(subplot_kw={"xlabel": METRICS["psnr"].title, "ylabel": METRICS["own_material_knn"].title})
    axes.spines[["top", "right"]].set_visible(False)
    x, y = mean["psnr"].dropna(), 100 * mean["own_material_knn"]
    for number, name in enumerate(sorted(x.index, key=y.get, reverse=True)):  # the legend in the order of the points
        deviations = 100 * std["own_material_knn"][name], std["psnr"][name]
        color, marker, size = f"C{number}", "osD^vPX"[number % 7], 7
        if name == "STELLAR":
            color, marker, size = "black", "*", 14
        axes.errorbar(x[name], y[name], *deviations, marker, markersize=size, lw=0.8, label=name, color=color)
    figure.legend(loc="outside right", frameon=False)
    return figure


def run_folder(args, name, seed):
    return Path(args.output_dir, f"{name.replace(' ', '-')}-{seed}")


def run(name, seed, folder, args):
    """Trains a variant, or goes on from its last checkpoint, unless there is nothing to train; and measures it."""
    variant = VARIANTS[name]
    model = make_model(variant, seed)
    processor = default_processor(model)
    if variant.weights_of:
        model = variant.model.from_pretrained(run_folder(args, variant.weights_of, seed), **variant.config)
    elif name == "k-means segments":
        model = measures.KMeansSegments(CONFIG["num_sparse_tokens"], processor.image_mean, processor.image_std)
    elif name != "untrained":
        changes = {"output_dir": folder, "seed": seed, "max_steps": args.max_steps}
        scenes = load_tabletop_scenes("train", args.num_train_scenes)
        trainer = StellarTrainer(model, StellarTrainingArguments(**TRAINING | changes), train_dataset=scenes)
        trainer.train(resume_from_checkpoint=bool(list(folder.glob("checkpoint-*"))))
        if trainer.state.global_step < args.max_steps:
            sys.exit("Interrupted: repeat the command to go on.")
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return {"variant": name, "seed": seed, **measure(model, processor, args.num_test_scenes)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="paper-in-miniature", help="Where everything is written.")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of weights and views.")
    parser.add_argument("--max_steps", type=int, default=150, help="Steps of each training, of 32 images.")
    parser.add_argument("--num_train_scenes", type=int, default=8000, help="Scenes to train on.")
    parser.add_argument("--num_test_scenes", type=int, default=300, help="Scenes to measure on.")
    parser.add_argument("--quick", action="store_true", help=f"Other defaults: {QUICK}")
    if parser.parse_args().quick:
        parser.set_defaults(output_dir="paper-in-miniature-quick", **QUICK)
    args = parser.parse_args()

    settings = f"{args.max_steps} steps, {args.num_train_scenes} training scenes, {args.num_test_scenes} test scenes"
    runs = [(name, seed) for seed in args.seeds for name in dict.fromkeys(["STELLAR", *args.variants])]
    results, seconds = [], []
    for number, (name, seed) in enumerate(runs):
        folder = run_folder(args, name, seed)
        file = folder / "result.json"
        if not file.exists():
            left = f", {sum(seconds) / len(seconds) * (len(runs) - number) / 60:.0f} minutes left" if seconds else ""
            print(f"\nRun {number + 1} of {len(runs)}: {name}, seed {seed}{left}", flush=True)
            start = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            found = {"settings": settings, "result": run(name, seed, folder, args)}
            file.with_suffix(".incomplete").write_text(json.dumps(found, indent=1))
            file.with_suffix(".incomplete").replace(file)
            seconds.append(time.monotonic() - start)
        found = json.loads(file.read_text())
        if found["settings"] != settings:
            sys.exit(f"{file} is of {found['settings']}, not of {settings}: choose another --output_dir.")
        results.append(found["result"])
        report(results, settings, Path(args.output_dir))
    print("\n" + Path(args.output_dir, "results.md").read_text())


if __name__ == "__main__":
    main()
