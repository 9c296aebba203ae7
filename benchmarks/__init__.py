# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Measurements of speed and memory: `python -m benchmarks --help`, from the root of the repository."""
