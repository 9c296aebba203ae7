# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""The public names of this package, each imported on first use."""

from .images import StellarCollator as StellarCollator
from .images import images_to_tensor as images_to_tensor
from .images import read_image as read_image
from .loading import EndlessStream as EndlessStream
from .loading import load_images as load_images
from .loading import undecoded as undecoded
from .moving_object import load_moving_object as load_moving_object
from .photo_mosaics import PHOTOGRAPH_NAMES as PHOTOGRAPH_NAMES
from .photo_mosaics import load_photo_mosaics as load_photo_mosaics
from .tabletop_scenes import load_tabletop_scenes as load_tabletop_scenes
from .unreadable import UnreadableImages as UnreadableImages
from .views import StellarViews as StellarViews
