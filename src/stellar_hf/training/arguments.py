# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Arguments of the joint objective's training."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..configuration_stellar import StellarConfig
from ..data import StellarCollator, StellarViews


@dataclass
class StellarTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the defaults of STELLAR's pre-training (arXiv 2602.01905) and the settings of its views.

    AdamW with weight decay 0.04 and gradient clipping at 3.0 is the paper's recipe; the paper names no schedule, ours
    is a cosine after a linear warm-up. All terms, weights and temperatures of the objective are fields of
    [`StellarConfig`].

    Raises:
        ValueError: On a momentum or a share outside of [0, 1], `remove_unused_columns`, a scale that is not two
            numbers, an unknown place of the views, or processes that may take unequal numbers of steps.
    """

    learning_rate: float = field(
        default=1.5e-4, metadata={"help": "Peak learning rate of AdamW (paper: 1.5e-4 for B/16, 5e-5 for L/16, H/14)."}
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
    views_on: str = field(
        default="accelerator",
        metadata={
            "help": "Where views are made: 'accelerator', batched, while the workers only decode; or 'cpu', in the "
            "workers, whose draws a resumed run does not repeat."
        },
    )
    decode_size: int | None = field(
        default=None,
        metadata={
            "help": "Short side in pixels that larger images are reduced to when they are read; by default the "
            "smallest from which no view is enlarged."
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
    local_size: int = field(default=96, metadata={"help": "Side of a local view in pixels."})
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

    def __post_init__(self):
        if self.accelerator_config is None:
            # Every process reads its own shards of a stream. By default one process reads them for all.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        for name in ("teacher_momentum", "max_unreadable_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be in [0, 1].")
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

    def views(self, config: StellarConfig) -> StellarViews:
        """
        The views that these arguments ask for.

        Args:
            config: Of the model, which gives the global views' size and the statistics of the normalization.

        Raises:
            ValueError: On an impossible number, size or range of views.
        """
        # Their lengths are checked where they are used: by __post_init__ and by StellarViews.
        return StellarViews(
            num_global_views=self.num_global_views,
            num_local_views=self.num_local_views,
            global_size=config.image_size,
            local_size=self.local_size,
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
        crops = [(views.global_size, views.global_scale[0])]
        if views.num_local_views:
            crops.append((views.local_size, views.local_scale[0]))
        largest = max(math.ceil(size / math.sqrt(scale)) for size, scale in crops)
        return StellarCollator(
            image_column=self.image_column,
            decode_size=self.decode_size or largest,
            views=views if self.views_on == "cpu" else None,
        )
