# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A prior over tokens and localization, from which images are drawn: model, training and measure."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
