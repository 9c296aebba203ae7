# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .evaluation import GENERATION_COLUMNS as GENERATION_COLUMNS
from .evaluation import GenerationEvaluation as GenerationEvaluation
from .evaluation import ImageClassifier as ImageClassifier
from .evaluation import draw_normal as draw_normal
from .evaluation import nearest_distances as nearest_distances
from .evaluation import other_scenes as other_scenes
from .evaluation import train_classifier as train_classifier
from .modeling_token_prior import StellarTokenPrior as StellarTokenPrior
from .modeling_token_prior import StellarTokenPriorOutput as StellarTokenPriorOutput
from .pipeline_token_prior import StellarTokenPriorPipeline as StellarTokenPriorPipeline
from .training import StellarTokenPriorTrainer as StellarTokenPriorTrainer
from .training import TokenPriorForTraining as TokenPriorForTraining
