# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
The files of checkpoints, without a trainer: what a folder holds, whether it is whole, and how one takes its place.

A checkpoint is a folder `checkpoint-<step>` in the output folder of a training. It is written in a folder beside it
and renamed when it is complete, with a checksum of every file in `checksums.json`.
"""

import json
import os
import re
import shutil
import socket
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..hub_stellar import apply_umask

try:
    import fcntl
except ImportError:  # on Windows, where output folders are not locked
    fcntl = None  # type: ignore[assignment]

CHECKSUMS_NAME = "checksums.json"

# Inside the output folder, so that a rename suffices; the Trainer pushes nothing whose name starts so.
STAGING = "_saving"
_REPLACED = "replaced-"
_LOCK = "_training.lock"

# What a training needs to go on, and the names that it may have: alone, in shards, of PEFT, FSDP or DeepSpeed.
_PARTS = {
    SAFE_WEIGHTS_NAME: ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp_*", "*/adapter_model.*"),
    OPTIMIZER_NAME: ("*optimizer*",),
    SCHEDULER_NAME: (SCHEDULER_NAME,),
    "rng_state.pth": ("rng_state*.pth",),
    "log_means_0.pth": ("log_means_*.pth",),
}
_PARTS_IN_DEEPSPEED_FOLDER = (SAFE_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)
_CHUNK = 2**20


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint(os.PathLike):
    """
    What `inspect` found in a folder.

    Attributes:
        folder: The folder.
        problem: Why a training cannot go on from it, a sentence that names the file; None if it can.
        state: The Trainer's state; an empty one where it cannot be read.
        config: The model's configuration; None where the folder has none, as beside adapters or sharded weights.
        num_processes: How many processes wrote it.
        is_model_whole: Whether its weights are whole, also where a training cannot go on: `save_only_model` leaves the
            rest out.
    """

    folder: Path
    problem: str | None = None
    state: TrainerState = field(default_factory=TrainerState)
    config: dict[str, Any] | None = None
    num_processes: int = 1
    is_model_whole: bool = False

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def lacks(self, process_index: int, num_processes: int) -> str | None:
        """Name of the first file that one of so many processes needs for itself and does not find, or None."""
        rng_state = "rng_state.pth" if num_processes == 1 else f"rng_state_{process_index}.pth"
        names = (rng_state, log_means_name(process_index))
        return next((name for name in names if not (self.folder / name).exists()), None)


def inspect(folder: str | Path) -> Checkpoint:
    """
    Reads what a folder holds of a training, every byte of it once.

    Files are compared with the checksums that were written with them. Checkpoints of earlier versions have none: of
    those, weights and states must have their ends.
    """
    folder = Path(folder)
    found: dict[str, Any] = {}
    try:
        _read(folder, found)
    except ValueError as error:
        found["problem"] = str(error)
    except OSError as error:
        found["problem"] = f"The checkpoint {folder} cannot be read: {error}."
    return Checkpoint(folder, **found)


def _read(folder: Path, found: dict[str, Any]) -> None:
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {folder}.")
    if not (folder / TRAINER_STATE_NAME).exists():
        raise ValueError(f"{folder} is no checkpoint of a training: it has no {TRAINER_STATE_NAME}.")
    checksums = _read_checksums(folder)
    if checksums is None:
        _check_ends(folder)
        found["num_processes"] = _count_processes(folder)
    else:
        _check_checksums(folder, checksums["files"])
        found["num_processes"] = checksums["num_processes"]
    found["state"] = _read_state(folder / TRAINER_STATE_NAME)
    if (folder / CONFIG_NAME).exists():
        found["config"] = _read_json(folder / CONFIG_NAME)
    missing = _missing_parts(folder)
    found["is_model_whole"] = SAFE_WEIGHTS_NAME not in missing
    if {OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth"} <= set(missing):
        raise ValueError(
            f"The checkpoint {folder} has no {OPTIMIZER_NAME}: with save_only_model it holds a model, to start a new "
            "training from, but not the state of a training to resume."
        )
    if missing:
        raise ValueError(_damage(folder / missing[0], "is missing"))


def _read_state(file: Path) -> TrainerState:
    try:
        return TrainerState.load_from_json(str(file))
    except (ValueError, TypeError) as error:
        raise ValueError(_damage(file, "is not readable")) from error


def _read_checksums(folder: Path) -> dict[str, Any] | None:
    file = folder / CHECKSUMS_NAME
    if not file.exists():
        return None
    content = _read_json(file)
    if content.pop("crc32", None) != _crc32_of_json(content):
        raise ValueError(_damage(file, "is not as it was written"))
    return content


def _check_checksums(folder: Path, files: dict[str, str]) -> None:
    for name, checksum in files.items():
        file = folder / name
        if not file.exists():
            raise ValueError(_damage(folder / name, "is missing"))
        if _crc32(file) != checksum:
            raise ValueError(_damage(folder / name, "is not as it was written"))


def _check_ends(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if not _has_end(file):
            raise ValueError(_damage(file, "is incomplete"))


def _has_end(file: Path) -> bool:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except SafetensorError:
            return False
    return file.suffix not in (".pt", ".pth", ".bin") or not file.is_file() or is_zipfile(file)


def _missing_parts(folder: Path) -> list[str]:
    missing = [name for name, patterns in _PARTS.items() if not any(any(folder.glob(each)) for each in patterns)]
    if any(folder.glob("global_step*")):
        missing = [name for name in missing if name not in _PARTS_IN_DEEPSPEED_FOLDER]
    return missing


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damage(file, "is not readable")) from error
    if not isinstance(content, dict):
        raise ValueError(_damage(file, "is not readable"))
    return content


def _damage(file: Path, what: str) -> str:
    return f"The checkpoint {file.parent} is damaged: {file.name} {what}."


def _count_processes(folder: Path) -> int:
    matches = [re.fullmatch(r"(?:rng_state|log_means)_(\d+)\.pth", file.name) for file in folder.iterdir()]
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def log_means_name(process_index: int) -> str:
    """Name of the file with a process's means since the last log."""
    return f"log_means_{process_index}.pth"


# Choosing ------------------------------------------------------------------------------------------------------------


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, the newest step last; whole or not."""
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name)) and path.is_dir():
            steps[path] = int(match[1])
    return sorted(steps, key=lambda path: steps[path])


def newest_whole(folders: list[Path]) -> Path | None:
    """The last of these folders that a training can go on from."""
    return next((folder for folder in reversed(folders) if inspect(folder).problem is None), None)


# Writing -------------------------------------------------------------------------------------------------------------


def publish(staged: Path, checkpoint: Path, num_processes: int) -> None:
    """
    Gives a complete folder its name, in place of an earlier one of the same step.

    Args:
        staged: Folder in `STAGING`, to which all processes have written their part.
        checkpoint: What it is to be called.
        num_processes: How many processes that were.
    """
    apply_umask(staged)
    _write_checksums(staged, num_processes)
    _sync(staged)
    replaced = staged.with_name(_REPLACED + staged.name)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        checkpoint.rename(replaced)
    staged.rename(checkpoint)
    _sync_one(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    with suppress(OSError):
        staged.parent.rmdir()


def tidy(output_dir: Path) -> None:
    """Removes what a killed run was writing; a checkpoint that it was just replacing gets its name back."""
    staging = output_dir / STAGING
    for replaced in staging.glob(f"{_REPLACED}*"):
        checkpoint = output_dir / replaced.name.removeprefix(_REPLACED)
        if not checkpoint.exists():
            replaced.rename(checkpoint)
    shutil.rmtree(staging, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint of a training, or a link to one; a folder without a Trainer's state stays."""
    if not (checkpoint / TRAINER_STATE_NAME).exists():
        return
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def rotate(output_dir: Path, limit: int | None, keep: list[Path]) -> None:
    """
    Removes the oldest checkpoints by their step, down to a number.

    Args:
        output_dir: Folder of the training.
        limit: Checkpoints to keep; all of them if None or below 1.
        keep: Checkpoints that stay, beside the newest one.
    """
    if limit is None or limit < 1:
        return
    folders = [folder for folder in checkpoint_folders(output_dir) if (folder / TRAINER_STATE_NAME).exists()]
    kept = {*folders[-1:], *(folder for folder in folders if folder in keep)}
    removable = [folder for folder in folders if folder not in kept]
    for folder in removable[: max(0, len(folders) - max(limit, len(kept)))]:
        with suppress(OSError):  # one that cannot be removed is no reason to stop a training
            remove(folder)


def _write_checksums(folder: Path, num_processes: int) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS_NAME)
    checksums = {file.relative_to(folder).as_posix(): _crc32(file) for file in files}
    content = {"num_processes": num_processes, "files": checksums}
    text = json.dumps({**content, "crc32": _crc32_of_json(content)}, indent=2)
    (folder / CHECKSUMS_NAME).write_text(text, encoding="utf-8")


def _crc32(file: Path) -> str:
    # Against accidents, not against forgery; half the time of SHA-256.
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def _crc32_of_json(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _sync(folder: Path) -> None:
    """Has everything on disk before the rename: a file system may order the two otherwise when power fails."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt":
        return  # Windows syncs nothing that is open for reading, and opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_megabytes(folder: str | Path) -> float:
    """Free space of the file system that a folder is on or will be on."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free / 2**20


# One training in a folder --------------------------------------------------------------------------------------------


class FolderLock:
    """
    Keeps two trainings out of one output folder, by a lock of the operating system, which ends with its process
    however that ends. Where the file system has no locks, there is none.

    It is not inherited by workers, which may outlive a killed training by seconds, and can be taken several times in
    one process.

    Args:
        output_dir: Folder of the training.
    """

    def __init__(self, output_dir: str | Path):
        self._file = Path(output_dir, _LOCK)
        self._descriptor: int | None = None
        self._depth = 0

    def acquire(self) -> str | None:
        """Takes the lock, or returns which process has it, and since when."""
        if self._depth == 0:
            try:
                self._descriptor = self._open_locked()
            except BlockingIOError:
                return self._holder()
            except OSError:  # no such lock here
                self._descriptor = None
        self._depth += 1
        return None

    def release(self) -> None:
        """Gives the lock back, as many times as it was taken."""
        self._depth -= 1
        if self._depth == 0 and self._descriptor is not None:
            with suppress(OSError):
                self._file.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _open_locked(self) -> int | None:
        if fcntl is None:
            return None
        while True:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._file.exists() and os.path.samestat(os.fstat(descriptor), self._file.stat()):
                    self._sign(descriptor)
                    return descriptor
                os.close(descriptor)  # of a training that has just ended, and removed it
            except OSError:
                os.close(descriptor)
                raise

    @staticmethod
    def _sign(descriptor: int) -> None:
        text = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with suppress(OSError):  # a full disk; the lock holds without
            os.ftruncate(descriptor, 0)
            os.write(descriptor, text.encode())

    def _holder(self) -> str:
        try:
            return self._file.read_text(encoding="utf-8", errors="replace") or "another process"
        except OSError:
            return "another process"
