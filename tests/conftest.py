# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Reference models, rebuilt from the names and shapes of their weights, and a tiny model of our own."""

import gc
import json
import math
import multiprocessing
import os
import pickle
import shlex
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def golden_weight(name: str, shape: list[int]) -> torch.Tensor:
    """The weight that a reference model has under its released name."""
    weight = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * 0.05
    prototypes = tuple(
        f"{head}.layer.weight" for head in ("clustering_head", "cls_cluster_head", "teacher_head", "teacher_cls_head")
    )
    if len(shape) == 1 and name.endswith("weight"):
        weight = 1 + weight
    if name == "position_embedding.positional_encoding_gaussian_matrix":
        weight = weight * 20
    if name.endswith(("sparse_tokens", "position_embeddings", "cls_token")):
        weight = weight * 10
    if name.endswith(prototypes):
        weight = weight * 20
    return torch.from_numpy(weight.astype(np.float32))


def golden_vq_weight(key: str, shape: list[int]) -> torch.Tensor:
    """The weight that the reference tokenizer has under its released name."""
    weight = np.random.default_rng(zlib.crc32(f"vq.{key}".encode())).standard_normal(shape) * 0.05
    if len(shape) == 1 and key.endswith("weight"):
        weight = 1 + weight
    if key == "quantize.embedding.weight":
        weight = weight * 20
    if len(shape) == 4:
        weight = weight * 20 / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(weight.astype(np.float32))


def pytest_collection_finish() -> None:
    """Takes what libraries hold from the garbage collector, which every training calls."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden_tensors() -> Callable[[str], dict[str, torch.Tensor]]:
    """Reads a file of reference tensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_weights() -> Callable[[str], dict[str, torch.Tensor]]:
    """Builds the state dict of a reference model in the released layout."""
    return lambda case: {name: golden_weight(name, shape) for name, shape in CASES[case]["state_dict"].items()}


@pytest.fixture(scope="session")
def golden_vq_weights() -> dict[str, torch.Tensor]:
    """The state dict of the reference tokenizer in the released layout."""
    return {key: golden_vq_weight(key, shape) for key, shape in CASES["vq"]["state_dict"].items()}


@pytest.fixture(scope="session")
def golden_overrides() -> Callable[[str], dict[str, Any]]:
    """Configuration fields of a reference model that the shapes of its weights do not tell."""
    return lambda case: {
        "num_attention_heads": CASES[case]["config"]["heads"],
        "localization_temperature": CASES[case]["config"]["temp"],
        "mask_ratio": 0.75,
    }


@pytest.fixture(scope="session")
def auto_image_processor() -> type:
    """`AutoImageProcessor`; a test that needs it is skipped where there is none."""
    from transformers import AutoImageProcessor

    try:
        AutoImageProcessor.from_pretrained  # noqa: B018
    except ImportError:
        pytest.skip("This version of Transformers has no AutoImageProcessor without torchvision.")
    return AutoImageProcessor


@pytest.fixture(scope="session")
def load_processor() -> Callable[..., Any]:
    """Loads an image processor as a user does who has this package: by the Auto class, where there is one."""
    from transformers import AutoImageProcessor

    from stellar_hf import StellarImageProcessorPil

    try:
        return AutoImageProcessor.from_pretrained
    except ImportError:
        return StellarImageProcessorPil.from_pretrained


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Builds the configuration of a model of two small layers: 4x4 patches, 4 tokens, pixels."""
    from stellar_hf import StellarConfig

    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        "num_sparse_tokens": 4,
        "decoder_hidden_size": 24,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "reconstruction_target": "pixels",
        "codebook_size": 16,
        "num_prototypes": 12,
        "prototype_dim": 8,
        "projection_hidden_size": 20,
        "mask_ratio": 0.6,
    }
    return lambda **overrides: StellarConfig(**{**fields, **overrides})


@pytest.fixture
def at_event():
    """Builds a callback that calls functions at events: `at_event(on_step_end=lambda model, **kwargs: ...)`."""

    class AtEvent(TrainerCallback):
        def __init__(self, **functions):
            for event, function in functions.items():
                setattr(self, event, lambda args, state, control, function=function, **kwargs: function(**kwargs))

    return AtEvent


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., list[Any]]:
    """Calls `function(accelerator, *args)` in two processes, forked from this one, and gives what each returns."""

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        context = multiprocessing.get_context("fork")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [
            context.Process(target=_run_as_one_of_two, args=(rank, port, sender, function, args))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            assert all(receiver.poll(60) for receiver, _ in pipes), "A process has not answered in a minute."
            return [pickle.loads(receiver.recv_bytes()) for receiver, _ in pipes]
        finally:
            for process in processes:
                process.terminate()
                process.join()

    return run


def _run_as_one_of_two(rank: int, port: int, sender: Any, function: Callable[..., Any], args: tuple) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)  # a thread pool does not outlive a fork
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    sender.send_bytes(pickle.dumps(function(accelerator, *args)))  # `send` would share tensors, whose owner ends
    accelerator.wait_for_everyone()


# Processes -----------------------------------------------------------------------------------------------------------

FORKING_PYTHON = Path(__file__).with_name("forking_python.py")
LIBRARIES = (
    "torch._dynamo",
    "transformers.trainer",
    "transformers.integrations",
    "transformers.models.auto",
    "diffusers.pipelines.pipeline_utils",
    "datasets",
    "matplotlib.pyplot",
    "scipy.optimize",
)


@pytest.fixture(scope="session")
def make_python(tmp_path_factory) -> Callable[..., Any]:
    """
    A context with an executable that behaves as Python does, but whose processes have imported libraries already.

    `environment` is added to that of the tests, for the import of the libraries and for what runs.
    """

    @contextmanager
    def make(libraries: tuple[str, ...] = LIBRARIES, **environment: str) -> Iterator[str]:
        folder = tmp_path_factory.mktemp("python")
        path, executable = folder / "socket", folder / "python"
        command = shlex.join(map(str, [sys.executable, "-IS", FORKING_PYTHON, "run", path]))
        variables = shlex.join(f"{name}={value}" for name, value in environment.items())
        executable.write_text(f'#!/bin/sh\nexec env {variables} {command} "$@"\n')
        executable.chmod(0o755)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # the other one leaves CUDA unusable after a fork
            **environment,
        }
        command = [sys.executable, FORKING_PYTHON, "serve", path, *libraries]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, **pipes) as server:
            assert server.stdout.readline() == b"ready\n"
            yield str(executable)
            server.kill()  # to close its stdin may not do: processes that were forked from the tests may hold it

    return make


@pytest.fixture(scope="session")
def forking_python(make_python, tmp_path_factory) -> Iterator[str]:
    """An executable that behaves as Python does, offline, and has imported the large libraries, not this package."""
    with make_python(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path_factory.mktemp("home"))) as executable:
        yield executable
