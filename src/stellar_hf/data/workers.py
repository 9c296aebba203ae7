# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""Workers of data loaders: Ctrl-C and SIGTERM leave them alone, and none of them keeps its process from ending."""

import atexit
import multiprocessing
import multiprocessing.util  # noqa: F401 - so that what it does at the end comes after what is done here
import signal


def ignore_signals(worker_id: int) -> None:
    """For `worker_init_fn`: Ctrl-C and SIGTERM come to workers, too, which the main process ends when it is ready."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """An error leaves workers running, which Python would end by SIGTERM, and wait for without end."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report that they were killed
    for worker in workers:
        worker.kill()


atexit.register(_kill_workers)
