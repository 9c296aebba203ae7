# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Retrieval of single concepts: the tokens of other images that are most like a token."""

from ..features.index import TokenMatches, build_token_index, import_faiss, nearest_tokens

__all__ = ["TokenMatches", "build_token_index", "import_faiss", "nearest_tokens"]
