# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .encoding import ImageFeatures as ImageFeatures
from .encoding import encode_batches as encode_batches
from .encoding import encode_images as encode_images
from .encoding import encoder_of as encoder_of
from .encoding import evaluation_mode as evaluation_mode
from .encoding import load_processor as load_processor
from .encoding import model_features as model_features
from .index import TokenMatches as TokenMatches
from .index import build_token_index as build_token_index
from .index import import_faiss as import_faiss
from .index import index_features as index_features
from .index import nearest_tokens as nearest_tokens
from .shards import FeatureShards as FeatureShards
from .shards import load_features as load_features
from .shards import save_features as save_features
from .tokens import ExtractedTokens as ExtractedTokens
