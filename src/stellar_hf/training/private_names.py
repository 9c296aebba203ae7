# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Every private name of another library that this package uses, and public ones that it does not document, with the
reason; a test tells when a library changes one.

The list holds names of all folders, also of those that do not import from here. A name that is only set or read on a
class, as the base classes for models ask of their subclasses, is a convention between the libraries and us.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class PrivateName:
    """
    A private name of another library, or a public one of a module that its library does not document.

    Attributes:
        owner: Module or class that has it, by its full name.
        name: The name.
        reason: What it is used for, and why no public name serves.
        parameters: Of a function, those that this package relies on; None for anything else.
    """

    owner: str
    name: str
    reason: str
    parameters: tuple[str, ...] | None = None


_TRAINER = "transformers.trainer.Trainer"
_MODEL = "transformers.modeling_utils.PreTrainedModel"
_MODEL_MIXIN = "diffusers.models.modeling_utils.ModelMixin"
_PIPELINE = "diffusers.pipelines.pipeline_utils.DiffusionPipeline"
_METRIC = "evaluate.module.EvaluationModule"
_HELP = "argparse.ArgumentDefaultsHelpFormatter"

PRIVATE_NAMES = (
    # training/: the Trainer has no public hook for when, where and how it writes a checkpoint.
    PrivateName(
        _TRAINER,
        "_determine_best_metric",
        "Ctrl-C and SIGTERM save a checkpoint although the model is not the best one.",
        ("self", "metrics", "trial"),
    ),
    PrivateName(_TRAINER, "_get_output_dir", "Checkpoints are written aside and renamed.", ("self", "trial")),
    PrivateName(_TRAINER, "_save_checkpoint", "Its end publishes what was written.", ("self", "model", "trial")),
    PrivateName(
        _TRAINER,
        "_push_from_checkpoint",
        "Only a published checkpoint is pushed to the Hub.",
        ("self", "checkpoint_folder"),
    ),
    PrivateName(
        "accelerate.accelerator.Accelerator",
        "_is_accelerate_prepared",
        "A mark on a model that an evaluation has prepared; see forget_preparation.",
    ),
    PrivateName(
        "transformers.utils.notebook",
        "NotebookTrainingTracker",
        "The table of a training in a notebook, with columns of ours; undocumented.",
        ("num_steps", "column_names"),
    ),
    # modeling_stellar.py: what a model tells Transformers about itself, as its own models do.
    PrivateName(
        "transformers.utils.output_capturing",
        "capture_outputs",
        "Collects hidden states and attentions, as the models of Transformers do; undocumented.",
        ("func", "tie_last_hidden_states"),
    ),
    PrivateName(
        "transformers.configuration_utils.PreTrainedConfig",
        "_attn_implementation",
        "The attention that the user chose, which has no public name.",
    ),
    PrivateName(
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
        "The segmentation pipeline takes the models of this list alone, to which no function adds; undocumented.",
    ),
    PrivateName(_MODEL, "_init_weights", "The hook for the weights of new modules.", ("self", "module")),
    PrivateName(_MODEL, "_no_split_modules", "Modules that device maps and FSDP keep whole."),
    PrivateName(_MODEL, "_supports_sdpa", "Which attention the model can use."),
    PrivateName(_MODEL, "_supports_flash_attn", "Which attention the model can use."),
    PrivateName(_MODEL, "_supports_flex_attn", "Which attention the model can use."),
    PrivateName(_MODEL, "_supports_attention_backend", "Which attention the model can use."),
    PrivateName(_MODEL, "_can_compile_fullgraph", "Says that forward compiles as one graph."),
    PrivateName(_MODEL, "_can_record_outputs", "The modules whose outputs capture_outputs collects."),
    PrivateName(
        _MODEL, "_keep_in_fp32_modules_strict", "The teacher stays in float32 when a model is loaded in half."
    ),
    PrivateName(_MODEL, "_keys_to_ignore_on_load_missing", "The teacher may be absent from a checkpoint."),
    PrivateName(_MODEL, "_keys_to_ignore_on_load_unexpected", "Parts of pre-training that an encoder leaves aside."),
    # pipelines/ and prior/: what models and pipelines tell Diffusers about themselves, as its own do.
    PrivateName(_MODEL_MIXIN, "_supports_gradient_checkpointing", "Says that the model can."),
    PrivateName(_MODEL_MIXIN, "_gradient_checkpointing_func", "The function that the user chose for it."),
    PrivateName(_MODEL_MIXIN, "_no_split_modules", "Modules that device maps keep whole."),
    PrivateName(_MODEL_MIXIN, "_repeated_blocks", "What compile_repeated_blocks compiles."),
    PrivateName(_MODEL_MIXIN, "_skip_layerwise_casting_patterns", "Layers that stay in the type of the computation."),
    PrivateName(
        _PIPELINE,
        "extract_init_dict",
        "Components that a saved pipeline of another class has are passed over; undocumented.",
        ("config_dict",),
    ),
    PrivateName(
        "diffusers.utils.accelerate_utils",
        "apply_forward_hook",
        "Offloaded weights are brought for encode and decode, too, as in Diffusers' own autoencoders; undocumented.",
        ("method",),
    ),
    PrivateName(_PIPELINE, "_optional_components", "Components that a pipeline can do without."),
    PrivateName(_PIPELINE, "_execution_device", "The device of the computation when models are offloaded."),
    PrivateName(_PIPELINE, "_get_signature_keys", "The names of a pipeline's components.", ("obj",)),
    # evaluation/: the two methods that a metric of evaluate defines, by its documentation.
    PrivateName(_METRIC, "_info", "Describes a metric.", ("self",)),
    PrivateName(_METRIC, "_compute", "Computes a metric.", ("self", "predictions", "references")),
    PrivateName(_HELP, "_get_help_string", "Help shows a default only where there is one.", ("self", "action")),
    PrivateName(_HELP, "_format_action_invocation", "Help shows each flag by one name.", ("self", "action")),
)


def forget_preparation(model: nn.Module) -> None:
    """
    Takes Accelerate's mark off a model that an evaluation has prepared: `prepare` would not wrap it any more for the
    training, whose processes would then not add up their gradients.
    """
    vars(model).pop("_is_accelerate_prepared", None)
