# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The commands of this package: `stellar-hf`, and `python -m stellar_hf.cli.NAME` for launchers."""
