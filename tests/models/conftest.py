# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
Transformers' own common tests, as the package `transformers_tests`.

They come only with Transformers' source distribution. It is downloaded once per version into the user's cache folder;
where that fails the tests are skipped, or fail if the environment variable REQUIRE_COMMON_TESTS is set.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stellar_hf"
MARKERS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test order torch_compile_test"


def pytest_configure(config) -> None:
    for name in MARKERS.split():
        config.addinivalue_line("markers", f"{name}: a marker of Transformers' own tests")


def cached_tests() -> Path:
    """Folder that holds the package `transformers_tests` of the installed version, downloaded if need be."""
    CACHE.mkdir(parents=True, exist_ok=True)
    root = CACHE / f"transformers-{transformers.__version__}"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                download_tests(Path(work)).rename(root)
    return root


def download_tests(work: Path) -> Path:
    """Folder in `work` that holds the package of the tests."""
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", requirement]
    subprocess.run([*command, "--dest", str(work)], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(work, [member for member in file if "/tests/" in member.name], filter="data")
    (tests,) = work.glob("*/tests")
    package = work / "root" / "transformers_tests"
    package.parent.mkdir()
    tests.rename(package)
    (package / "__init__.py").touch()
    return package.parent


def add_stand_in(module_name: str, **names) -> None:
    """A module that the common tests import, but that the source distribution leaves out."""
    module = ModuleType(module_name)
    vars(module).update(names)
    sys.modules[module_name] = module


def local_photograph(url: str) -> str:
    """Path of a photograph on this machine in place of the one at `url`: the tests ask for any picture."""
    import skimage

    return str(Path(skimage.__file__).parent / "data" / "chelsea.png")


COMMON_CONFIG_ARGUMENTS = {
    "architectures": ["StellarModel"],
    "chunk_size_feed_forward": 2,
    "dtype": "float16",
    "id2label": {0: "what", 1: "where"},
    "label2id": {"what": 0, "where": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}

try:
    sys.path.append(str(cached_tests()))
except (OSError, subprocess.CalledProcessError) as error:
    if os.environ.get("REQUIRE_COMMON_TESTS"):
        raise
    report = (getattr(error, "stdout", None) or b"").decode(errors="replace")
    warnings.warn(f"Transformers' common tests could not be downloaded: {error}\n{report}", stacklevel=1)
else:
    add_stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    add_stand_in(
        "transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {})
    )
    add_stand_in("transformers_tests.utils.test_configuration_utils", config_common_kwargs=COMMON_CONFIG_ARGUMENTS)
    add_stand_in("fetch_hub_objects_for_ci", url_to_local_path=local_photograph)
