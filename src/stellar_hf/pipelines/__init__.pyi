# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .maskgit_vq_model import MaskGitVQEncoderOutput as MaskGitVQEncoderOutput
from .maskgit_vq_model import MaskGitVQModel as MaskGitVQModel
from .pipeline_stellar import StellarPipeline as StellarPipeline
