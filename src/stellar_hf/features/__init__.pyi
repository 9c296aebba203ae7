# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .index import TokenMatches as TokenMatches
from .index import build_token_index as build_token_index
from .index import import_faiss as import_faiss
from .index import nearest_tokens as nearest_tokens
from .tokens import ExtractedTokens as ExtractedTokens
