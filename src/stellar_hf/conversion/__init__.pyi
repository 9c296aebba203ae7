# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .convert_maskgit_vq import convert_vq_checkpoint as convert_vq_checkpoint
from .convert_maskgit_vq import convert_vq_state_dict as convert_vq_state_dict
from .convert_stellar_to_hf import convert_checkpoint as convert_checkpoint
from .convert_stellar_to_hf import convert_state_dict as convert_state_dict
from .convert_stellar_to_hf import infer_config as infer_config
