# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Evaluation: kNN and linear probe, concepts, reconstruction, localization, segmentation, retrieval."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
