# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Arguments of the joint objective's training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from ..configuration_stellar import StellarConfig
from ..data import StellarCollator, StellarViews
from ..image_processing_pil_stellar import WHITE, check_background

# The paper's values, from which those that are not given are derived.
_LEARNING_RATE, _BATCH_SIZE = 1.5e-4, 2048
_LOCAL_SIZE, _IMAGE_SIZE = 96, 224


@dataclass
class StellarTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the defaults of STELLAR's pre-training (arXiv 2602.01905) and the settings of its views.

    AdamW with weight decay 0.04 and gradient clipping at 3.0 is the paper's recipe; the paper names no schedule, ours
    is a cosine after a linear warm-up. All terms, weights and temperatures of the objective are fields of
    [`StellarConfig`].

    Some values are derived where they are not given. `learning_rate` is `1.5e-4 * sqrt(batch / 2048)`: the paper's
    1.5e-4 at its batch of 2048 images, and the square-root law of Adam (arXiv 2205.10287) for other batches. The batch
    is that of a step, over all processes and accumulated forwards. `global_size` is the model's image size, and
    `local_size` 96/224 of it, in whole patches. `data_seed`, the seed of the order of the images on all processes, is
    `seed`. With `bf16`, `tf32` is on where the GPU has it.

    Schedules, all off by default; they follow the step's number alone, so a resumed run goes on with the same values:

    - `teacher_momentum_end`: the momentum of the EMA teacher reaches it along half a cosine (BYOL, arXiv 2006.07733,
      and DINO, arXiv 2104.14294: 0.996 to 1).
    - `weight_decay_end`: the same for the weight decay (DINO: 0.04 to 0.4).
    - `target_temperature_start`, `prediction_temperature_start`, `mask_ratio_start`: linear warm-up to the values of
      [`StellarConfig`] over `objective_warmup_steps` (DINO's teacher temperature: 0.04 to 0.07 over 30 of 100 epochs;
      STELLAR from random weights: mask ratio 0.6, then 0.8).
    - `freeze_prototypes_steps`: the prototypes of both heads are held still at first (SwAV, arXiv 2006.09882: 313 to
      5005 steps; DINO's last layer: the first epoch).
    - `layer_decay`: each layer of the encoder learns slower than the one above it by this factor (BEiT, arXiv
      2106.08254, and fine-tuning of MAE, arXiv 2111.06377: 0.65 to 0.75). The sparse tokens, the localization, the
      decoder and the heads, which a ViT does not bring along, learn with the full rate.

    Raises:
        ValueError: On NaN, a number out of its range, `remove_unused_columns`, a scale that is not two numbers, a
            background that is no colour, an unknown place of the views, or processes that may take unequal numbers of
            steps.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]  # a number after __post_init__
        default=None,
        metadata={
            "help": "Peak learning rate of AdamW; by default 1.5e-4 * sqrt(images of a step / 2048), which is the "
            "paper's for B/16 at its batch of 2048 (5e-5 for L/16 and H/14). Small models that start from random "
            "weights want more, such as 1e-3 to 2e-3 at 64 images."
        },
    )
    weight_decay: float = field(
        default=0.04, metadata={"help": "Weight decay; norms, biases, positions and tokens have none."}
    )
    max_grad_norm: float = field(default=3.0, metadata={"help": "Gradient clipping (paper: 3.0)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up, in steps or, below 1, a share of them."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the views are made of a column that forward does not name."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to log a NaN loss as 0."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for weights without a gradient; the objective has none."}
    )
    label_names: list[str] | None = field(
        default_factory=list, metadata={"help": "Inputs that evaluation gathers as labels; the objective needs none."}
    )

    image_column: str = field(default="image", metadata={"help": "Column of the data set that holds the images."})
    label_column: str = field(
        default="label",
        metadata={"help": "Column of the classes, where there are any; evaluations then measure kNN accuracy."},
    )
    num_knn_images: int = field(
        default=10000,
        metadata={"help": "Training images at most that an evaluation looks for neighbours among; 0: no kNN."},
    )
    views_on: str = field(
        default="accelerator",
        metadata={
            "help": "Where views are made: 'accelerator', batched, while the workers only decode; or 'cpu', in the "
            "workers. A resumed run then draws other views than the uninterrupted one."
        },
    )
    decode_size: int | None = field(
        default=None,
        metadata={
            "help": "Short side in pixels that larger images are reduced to when they are read; by default the "
            "smallest from which no view is enlarged."
        },
    )
    background: list[int] = field(
        default_factory=lambda: list(WHITE),
        metadata={
            "help": "Red, green and blue, in [0, 255], on which transparent images are composited; the image "
            "processor that is saved with the model has it, too."
        },
    )
    max_unreadable_share: float = field(
        default=0.01,
        metadata={
            "help": "Images that cannot be read are named once and replaced; training stops when they are more than "
            "this share of the images seen, or of 1000."
        },
    )
    num_global_views: int = field(default=8, metadata={"help": "Global views of an image, which are masked."})
    num_local_views: int = field(default=8, metadata={"help": "Local views of an image."})
    global_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the clean and of the global views in pixels; by default the model's image_size. Smaller "
            "views make a training cheaper, whose model is then used at its image_size, with finer maps."
        },
    )
    local_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of a local view in pixels; by default 96/224 of a global view, as in the paper, in whole "
            "patches."
        },
    )
    global_scale: list[float] = field(
        default_factory=lambda: [0.36, 1.0], metadata={"help": "Smallest and largest share of a global crop's area."}
    )
    local_scale: list[float] = field(
        default_factory=lambda: [0.06, 0.36], metadata={"help": "Smallest and largest share of a local crop's area."}
    )
    jitter_probability: float = field(default=0.8, metadata={"help": "Share of views whose colours are jittered."})
    grayscale_probability: float = field(default=0.2, metadata={"help": "Share of views that become gray."})
    blur_probability: float = field(default=0.5, metadata={"help": "Share of views that are blurred."})
    teacher_momentum: float = field(
        default=0.996, metadata={"help": "Momentum of the EMA teacher, of models with use_teacher (paper: 0.996)."}
    )

    teacher_momentum_end: float | None = field(
        default=None, metadata={"help": "Momentum at the end, along a cosine (BYOL, DINO: 1.0); constant by default."}
    )
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay at the end, along a cosine (DINO: 0.4); constant by default."}
    )
    target_temperature_start: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the targets at the start of its warm-up to the model's (DINO: 0.04 to 0.07)."
        },
    )
    prediction_temperature_start: float | None = field(
        default=None,
        metadata={"help": "Temperature of the predictions at the start of the same warm-up."},
    )
    mask_ratio_start: float | None = field(
        default=None,
        metadata={"help": "Mask ratio at the start of its warm-up to the model's (paper: 0.6 before 0.8)."},
    )
    objective_warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Warm-up of both temperatures and of the mask ratio: steps or, below 1, a share."},
    )
    freeze_prototypes_steps: float = field(
        default=0.0,
        metadata={"help": "First steps that hold the prototypes still, or, below 1, a share (SwAV: 313 to 5005)."},
    )
    freeze_encoder: bool = field(
        default=False,
        metadata={
            "help": "Trains decoder, clustering heads and token refinement alone, with the maps that the finished "
            "model uses: compact ones where it has them, without noise. The encoder stays as it is."
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={"help": "Factor of the learning rate from each encoder layer to the one below (BEiT, MAE: 0.75)."},
    )

    def __post_init__(self):
        if self.accelerator_config is None:
            # Every process reads streams by itself. By default one process reads them for all, and sends the images.
            self.accelerator_config = {"dispatch_batches": False}
        if self.tf32 is None and self.bf16 and not self.use_cpu and is_torch_tf32_available():
            self.tf32 = True  # more digits than those of the features that float32 products take from bf16 layers
        super().__post_init__()
        if self.learning_rate is None:
            batch_size = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = _LEARNING_RATE * math.sqrt(batch_size / _BATCH_SIZE)
        self._check_ranges()
        check_background(self.background)
        if self.views_on not in ("accelerator", "cpu"):
            raise ValueError(f"views_on is {self.views_on!r}, but must be 'accelerator' or 'cpu'.")
        data_loading: Any = self.accelerator_config  # an AcceleratorConfig by now
        if self.world_size > 1 and not data_loading.even_batches:
            raise ValueError(
                "even_batches of accelerator_config is False, but all processes must take equally many steps."
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the views are made of the image column.")
        for name in ("global_scale", "local_scale"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be two numbers, smallest and largest.")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # it speeds up copies to an accelerator; without one, torch warns

    def _check_ranges(self) -> None:
        def check(name: str, holds: Callable[[float], bool], allowed: str) -> None:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} is {value}, but must be {allowed}.")

        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            if any(isinstance(number, float) and math.isnan(number) for number in _as_list(value)):
                raise ValueError(f"{name} is {value}, but must be a number.")
        for name in ("teacher_momentum", "teacher_momentum_end"):
            check(name, lambda value: 0 <= value <= 1, "in [0, 1]")
        for name in (
            "learning_rate",
            "weight_decay",
            "weight_decay_end",
            "objective_warmup_steps",
            "freeze_prototypes_steps",
            "num_knn_images",
        ):
            check(name, lambda value: 0 <= value < math.inf, "a number of at least 0")
        for name in ("decode_size", "global_size", "local_size"):
            check(name, lambda value: value >= 1, "at least 1 pixel")
        for name in ("target_temperature_start", "prediction_temperature_start"):
            check(name, lambda value: 0 < value < math.inf, "a positive number")
        check("max_unreadable_share", lambda value: 0 <= value <= 1, "in [0, 1]")
        check("mask_ratio_start", lambda value: 0 <= value < 1, "in [0, 1)")
        check("layer_decay", lambda value: 0 < value <= 1, "in (0, 1]")
        if self.weight_decay_end is not None and self.weight_decay <= 0:
            raise ValueError(
                f"weight_decay_end is {self.weight_decay_end}, but weight_decay is {self.weight_decay}: a schedule "
                "has to start from a positive one."
            )
        if self.freeze_prototypes_steps and self.deepspeed_plugin is not None:
            raise ValueError(
                "freeze_prototypes_steps has no effect with DeepSpeed, which keeps the gradients to itself."
            )

    def views(self, config: StellarConfig) -> StellarViews:
        """
        The views that these arguments ask for.

        Args:
            config: Of the model, which gives the default size of the views and the statistics of the normalization.

        Raises:
            ValueError: On an impossible number, size or range of views.
        """
        # Their lengths are checked where they are used: by __post_init__ and by StellarViews.
        global_size = self.global_size or config.image_size
        return StellarViews(
            num_global_views=self.num_global_views,
            num_local_views=self.num_local_views,
            global_size=global_size,
            local_size=self.local_size or _default_local_size(global_size, config.patch_size),
            global_scale=tuple(self.global_scale),  # type: ignore[arg-type]
            local_scale=tuple(self.local_scale),  # type: ignore[arg-type]
            jitter_probability=self.jitter_probability,
            grayscale_probability=self.grayscale_probability,
            blur_probability=self.blur_probability,
            image_mean=tuple(config.image_mean),  # type: ignore[arg-type]
            image_std=tuple(config.image_std),  # type: ignore[arg-type]
        )

    def collator(self, views: StellarViews) -> StellarCollator:
        """What the workers of the data loader do: read images, and make the views if `views_on` says so."""
        return StellarCollator(
            image_column=self.image_column,
            decode_size=views.decode_size if self.decode_size is None else self.decode_size,
            views=views if self.views_on == "cpu" else None,
            background=self.background,
        )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _default_local_size(global_size: int, patch_size: int) -> int:
    """The side of a local view that is to the global one as in the paper, in whole patches."""
    return patch_size * max(1, round(global_size * _LOCAL_SIZE / _IMAGE_SIZE / patch_size))
