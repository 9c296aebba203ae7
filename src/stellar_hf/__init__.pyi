# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .configuration_stellar import StellarConfig as StellarConfig
from .image_processing_pil_stellar import StellarImageProcessorPil as StellarImageProcessorPil
from .image_processing_stellar import StellarImageProcessor as StellarImageProcessor
from .modeling_stellar import StellarBackbone as StellarBackbone
from .modeling_stellar import StellarForImageClassification as StellarForImageClassification
from .modeling_stellar import StellarForImageReconstruction as StellarForImageReconstruction
from .modeling_stellar import StellarForPreTraining as StellarForPreTraining
from .modeling_stellar import StellarForSemanticSegmentation as StellarForSemanticSegmentation
from .modeling_stellar import StellarModel as StellarModel
from .pipelines import MaskGitVQModel as MaskGitVQModel
from .pipelines import StellarPipeline as StellarPipeline
from .prior import StellarTokenPrior as StellarTokenPrior
from .prior import StellarTokenPriorPipeline as StellarTokenPriorPipeline
from .training import StellarTrainer as StellarTrainer
from .training import StellarTrainingArguments as StellarTrainingArguments

__version__: str
DEMO_MODEL: str
