# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""A pipeline that is pushed loads from the Hub, and, downloaded, by Diffusers' own class."""

import json

PUSH = """
import stellar_hf
from stellar_hf import StellarForImageReconstruction, StellarImageProcessorPil, StellarPipeline

pipe = StellarPipeline(
    image_processor=StellarImageProcessorPil.from_pretrained(stellar_hf.DEMO_MODEL),
    model=StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL),
)
pipe.push_to_hub("tester/pipeline")
"""

LOAD = """
import json

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from PIL import Image

import stellar_hf
from stellar_hf import StellarForImageReconstruction, StellarPipeline

pipes = [
    StellarPipeline.from_pretrained("tester/pipeline"),
    DiffusionPipeline.from_pretrained(
        snapshot_download("tester/pipeline"), custom_pipeline="pipeline", trust_remote_code=True
    ),
]
expected = StellarForImageReconstruction.from_pretrained(stellar_hf.DEMO_MODEL).state_dict()
for pipe in pipes:
    assert type(pipe) is StellarPipeline
    weights = pipe.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
print(json.dumps([pipe(image=Image.new("RGB", (50, 40))).images[0].size for pipe in pipes]))
"""


def test_pushed_pipeline_loads_from_the_hub(hub, run_python):
    run_python(PUSH, hub=hub)
    assert {"README.md", "model_index.json", "pipeline.py", "model/model.safetensors"} <= set(
        hub.files("tester/pipeline")
    )
    assert json.loads(run_python(LOAD, hub=hub)) == [[50, 40], [50, 40]]
