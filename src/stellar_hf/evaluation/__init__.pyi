# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .classification import MatchedClasses as MatchedClasses
from .classification import class_names as class_names
from .classification import concept_accuracy as concept_accuracy
from .classification import match_classes as match_classes
from .evaluate import evaluate_stellar as evaluate_stellar
from .evaluate import format_results_table as format_results_table
from .evaluate import raw_pixel_baseline as raw_pixel_baseline
from .knn import knn_accuracies as knn_accuracies
from .knn import knn_accuracy as knn_accuracy
from .knn import nearest_neighbours as nearest_neighbours
from .linear import linear_probe_accuracy as linear_probe_accuracy
from .localization import concept_labels as concept_labels
from .localization import localization_iou as localization_iou
from .metrics import Accuracy as Accuracy
from .reconstruction import psnr as psnr
from .reconstruction import tokens_and_psnr as tokens_and_psnr
from .representations import image_representations as image_representations
from .retrieval import TokenMatches as TokenMatches
from .retrieval import build_token_index as build_token_index
from .retrieval import import_faiss as import_faiss
from .retrieval import nearest_tokens as nearest_tokens
from .segmentation import class_iou as class_iou
from .segmentation import confusion_matrix as confusion_matrix
from .segmentation import dense_features as dense_features
from .segmentation import grid_labels as grid_labels
from .segmentation import knn_segmentation as knn_segmentation
from .segmentation import knn_segmentation_scores as knn_segmentation_scores
from .segmentation import load_label_maps as load_label_maps
from .segmentation import low_rank_features as low_rank_features
from .segmentation import mean_iou as mean_iou
from .segmentation import segmentation_probe_scores as segmentation_probe_scores
from .segmentation import train_segmentation_probe as train_segmentation_probe
