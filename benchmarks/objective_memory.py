# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Peak memory and time of one step of the STELLAR objective, beside the plain formulation of its K-wide terms.

The plain formulation holds the logits of every token and CLS over all K prototypes, and gathers the targets of every
masked token, in float32. Everything else is the same code. Each measurement runs in a fresh process; the exit status
is 1 if the objective alone saves less than 30 % of the peak, or if any gradient differs by more than 1e-4.

    python benchmarks/objective_memory.py
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stellar_hf import StellarConfig, StellarForPreTraining
from stellar_hf.loss_stellar import match_tokens, matched_fraction
from stellar_hf.objective_stellar import LOSS_TERMS, StellarObjective, Targets

PARTS = ("objective", "checkpointed", "whole")
REQUIRED_SAVING = 0.3
GRADIENT_TOLERANCE = 1e-4


class PlainObjective(StellarObjective):
    """The reference: `expected` of the targets is the assignment (rows, K) itself."""

    def targets(self, source, view):
        with torch.no_grad():
            logits = source.clustering_head.logits(view.projections).flatten(0, 1)
            assignments = self.assign(logits)
            del logits
            cls_assignments = self.assign(source.cls_clustering_head.logits(view.cls_projections))
        return Targets(
            tokens=view.tokens.detach(),
            expected=assignments.unflatten(0, view.tokens.shape[:2]),
            cls_expected=cls_assignments,
            from_teacher=source is not self.student,
            prototype_entropy=assignments.new_zeros(()),
            slot_information=assignments.new_zeros(()),
        )

    def match(self, tokens, targets):
        # The targets are never repeated for all views: only the gathered ones exist.
        num_views = len(tokens) // len(targets.tokens)
        target_tokens = targets.tokens.repeat_interleave(num_views, dim=0)
        index = match_tokens(tokens, target_tokens, self.config.matching_epsilon, self.config.matching_iterations)
        images = torch.arange(len(targets.tokens)).repeat_interleave(num_views)
        return targets.expected[images.unsqueeze(1), index], matched_fraction(index)

    def cross_entropy(self, head, projections, expected):
        logits = head.logits(projections).flatten(0, -2)
        log_probabilities = (logits / self.prediction_temperature).log_softmax(dim=-1)
        del logits
        return -(expected.flatten(0, -2) * log_probabilities).sum(dim=-1).mean()


class PlainStellarForPreTraining(StellarForPreTraining):
    objective_class = PlainObjective


MODELS = {"ours": StellarForPreTraining, "plain": PlainStellarForPreTraining}


def make_step(
    part: str, variant: str, arguments: argparse.Namespace
) -> tuple[StellarForPreTraining, Callable[[], torch.Tensor]]:
    """A model and a function that computes its loss: of the whole step, or from given encoder outputs on."""
    torch.manual_seed(0)
    batch, size = arguments.batch_size, arguments.image_size
    config = StellarConfig(
        image_size=size,
        num_prototypes=arguments.num_prototypes,
        num_sparse_tokens=arguments.num_sparse_tokens,
        num_hidden_layers=1 if part == "objective" else arguments.num_hidden_layers,
    )
    model = MODELS[variant](config).train()
    if part == "checkpointed":
        # The newer name, where Transformers has it.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    num_patches = (size // config.patch_size) ** 2
    if part != "objective":
        inputs = {
            "pixel_values": torch.randn(batch, 3, size, size),
            "global_pixel_values": torch.randn(batch, arguments.global_views, 3, size, size),
            "local_pixel_values": torch.randn(batch, arguments.local_views, 3, 96, 96),
            "noise": torch.rand(batch * arguments.global_views, num_patches),
            "code_labels": torch.randint(config.codebook_size, (batch, num_patches)),
        }
        return model, lambda: model(**inputs).loss

    def sequences(count: int, patches: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(count, 1 + patches + config.num_sparse_tokens, config.hidden_size))

    model.clean = sequences(batch, num_patches)
    model.masked = sequences(batch * arguments.global_views, int(num_patches * (1 - config.mask_ratio)))
    model.local = sequences(batch * arguments.local_views, (96 // config.patch_size) ** 2)

    def objective() -> torch.Tensor:
        (clean_cls, _, clean_tokens), (masked_cls, _, masked_tokens), (local_cls, _, _) = (
            model.stellar.split(views) for views in (model.clean, model.masked, model.local)
        )
        alignment = model.objective_class(config, model)
        clean = alignment.project(model, clean_cls, clean_tokens)
        terms = alignment.terms(clean, alignment.targets(model, clean), (masked_cls, masked_tokens), local_cls)
        return torch.stack([terms[name] for name in LOSS_TERMS if name in terms]).sum()

    return model, objective


def memory_status(field: str) -> float:
    """A field of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure_peak(part: str, variant: str, arguments: argparse.Namespace, gradients_file: Path) -> tuple[float, float]:
    """Peak resident MiB of a first step above the level just before it, and the loss; saves the gradients."""
    torch.set_num_threads(arguments.threads)
    model, compute_loss = make_step(part, variant, arguments)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM) to the present level
    before = memory_status("VmRSS")
    loss = compute_loss()
    loss.backward()
    peak = memory_status("VmHWM") - before
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    torch.save(gradients, gradients_file)
    return peak, loss.item()


def measure_time(part: str, variant: str, arguments: argparse.Namespace) -> float:
    """Seconds of the fastest step."""
    torch.set_num_threads(arguments.threads)
    model, compute_loss = make_step(part, variant, arguments)
    seconds = []
    for _ in range(arguments.timed_steps):
        model.zero_grad()
        start = time.perf_counter()
        compute_loss().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds, default=math.nan)


def in_fresh_process(function: Callable, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def largest_difference(file: Path, reference_file: Path) -> tuple[float, str]:
    """
    The largest difference of gradients relative to their tensor's largest entry, and its tensor.

    Key biases are left out: a softmax ignores them, so that their gradient is zero but for rounding.
    """
    ours, plain = torch.load(file, mmap=True), torch.load(reference_file, mmap=True)
    if ours.keys() != plain.keys():
        return math.inf, "different tensors"
    return max(
        ((ours[name] - gradient).abs().max().item() / gradient.abs().max().item(), name)
        for name, gradient in plain.items()
        if not name.endswith("k_proj.bias")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_prototypes", type=int, default=16384)
    parser.add_argument("--num_sparse_tokens", type=int, default=16)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--global_views", type=int, default=8)
    parser.add_argument("--local_views", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timed_steps", type=int, default=2, help="the fastest counts")
    arguments = parser.parse_args()

    passed = True
    print(
        f"{'part':14}{'plain MiB':>10}{'ours MiB':>10}{'saved':>8}{'plain s':>9}{'ours s':>8}{'ratio':>7}  gradients"
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {variant: Path(folder, f"{variant}.pt") for variant in MODELS}
        for part in arguments.parts:
            # Freed tensors go back to the system at once, so that resident memory is memory in use; this costs time.
            os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
            ours, loss = in_fresh_process(measure_peak, part, "ours", arguments, files["ours"])
            plain, plain_loss = in_fresh_process(measure_peak, part, "plain", arguments, files["plain"])
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
            seconds, plain_seconds = (
                in_fresh_process(measure_time, part, variant, arguments) for variant in ("ours", "plain")
            )
            difference, name = largest_difference(files["ours"], files["plain"])
            saving = 1 - ours / plain
            print(
                f"{part:14}{plain:10.0f}{ours:10.0f}{saving:8.1%}{plain_seconds:9.2f}{seconds:8.2f}"
                f"{seconds / plain_seconds:7.2f}  {difference:.1e} ({name})",
                flush=True,
            )
            passed &= difference <= GRADIENT_TOLERANCE and math.isclose(loss, plain_loss, rel_tol=1e-5)
            passed &= part != "objective" or saving >= REQUIRED_SAVING
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
