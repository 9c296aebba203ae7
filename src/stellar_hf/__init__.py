# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
STELLAR for the Hugging Face ecosystem: images as sparse semantic tokens (what) and a localization matrix (where).

Importing this package makes the Auto classes of Transformers know STELLAR. It stays light: torch and the libraries
are loaded with the first name that needs them.
"""

from importlib import import_module
from pathlib import Path

import lazy_loader
from wrapt import when_imported

__version__ = "0.2.0"

DEMO_MODEL = str(Path(__file__).parent / "demo")
"""Folder of a small model, pre-trained on the tabletop scenes, that comes with this package; for `from_pretrained`."""

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["DEMO_MODEL"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Registration waits for the Auto classes to be imported. Models take a chain of three links, since Transformers
# imports its Auto models in the middle of the module of layers that our models need: each link only imports the next
# one, which is harmless for a module that is half imported, and the last runs when everything is complete.


@when_imported("transformers.models.auto.configuration_auto")
def _register_config(configuration_auto) -> None:
    from .configuration_stellar import StellarConfig

    configuration_auto.AutoConfig.register(StellarConfig.model_type, StellarConfig, exist_ok=True)


@when_imported(f"{__name__}.modeling_stellar")
def _register_models(modeling_stellar) -> None:
    from transformers.models.auto import modeling_auto

    from .configuration_stellar import StellarConfig

    for auto_class, model_class in (
        (modeling_auto.AutoModel, modeling_stellar.StellarModel),
        (modeling_auto.AutoModelForPreTraining, modeling_stellar.StellarForPreTraining),
        (modeling_auto.AutoModelForImageClassification, modeling_stellar.StellarForImageClassification),
        (modeling_auto.AutoModelForSemanticSegmentation, modeling_stellar.StellarForSemanticSegmentation),
        (modeling_auto.AutoBackbone, modeling_stellar.StellarBackbone),
    ):
        auto_class.register(StellarConfig, model_class, exist_ok=True)
    # The segmentation pipeline looks at these names alone, and says of others that they are not supported.
    segmentation = modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    segmentation[StellarConfig.model_type] = modeling_stellar.StellarForSemanticSegmentation.__name__


@when_imported("transformers.modeling_layers")
def _import_models(_) -> None:
    import_module(".modeling_stellar", __name__)


@when_imported("transformers.models.auto.modeling_auto")
def _import_layers(_) -> None:
    import_module("transformers.modeling_layers")


@when_imported("transformers.models.auto.image_processing_auto")
def _register_image_processors(image_processing_auto) -> None:
    from transformers.utils import is_torchvision_available

    from .configuration_stellar import StellarConfig
    from .image_processing_pil_stellar import StellarImageProcessorPil

    processors: dict[str, type] = {"pil": StellarImageProcessorPil}
    if is_torchvision_available():
        from .image_processing_stellar import StellarImageProcessor

        processors["torchvision"] = StellarImageProcessor
    image_processing_auto.AutoImageProcessor.register(StellarConfig, image_processor_classes=processors, exist_ok=True)
