# Copyright 2026 The stellar_hf authors.
# Licensed under the Apache License, Version 2.0.
"""
An executable that behaves as Python does, but starts in no time: its processes are forked from one that has imported
the large libraries already. (To import PyTorch, Transformers, Diffusers and Datasets takes a core ten seconds.)

    python forking_python.py serve SOCKET MODULE ...     the process to fork from, until its stdin is closed
    python forking_python.py run SOCKET [-u] [-c CODE | -m MODULE | SCRIPT] ARGUMENT ...

What runs has the arguments, environment, folder, streams and signals of the second command, and ends it as it ended.
What libraries read from the environment while they are imported, they have read in the environment of the first.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from contextlib import suppress

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# The process to fork from --------------------------------------------------------------------------------------------


def serve(path: str) -> dict:
    """Forks a process for each connection. Returns in that process alone, what it shall run."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        gc.freeze()  # else a collection in a forked process would copy all of the memory
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in readable:
                os._exit(0)
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    return watch(connection)
            reap()


def reap() -> None:
    """Takes leave of processes that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def watch(connection: socket.socket) -> dict:
    """Forks the process that runs, in which it returns; passes signals on to it, and back how it ended."""
    message, streams, _, _ = socket.recv_fds(connection, 65536, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(65536)
    process = os.fork()
    if process == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return json.loads(message)

    def pass_signals() -> None:
        while number := connection.recv(1):
            os.kill(process, number[0])
        with suppress(ProcessLookupError):  # or nobody waits any more
            os.kill(process, signal.SIGKILL)

    threading.Thread(target=pass_signals, daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """What Python does with its arguments."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = paths + [path for path in sys.path[1:] if path not in paths]
    # Even where it was ignored when the tests were started, as by nohup and in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments[0] == "-u":
        del arguments[0]
        sys.stdout.reconfigure(write_through=True)
    kind, *rest = arguments
    if kind == "-c":
        sys.path.insert(0, "")
        code, *rest = rest
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv[:] = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.path.insert(0, folder)
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        sys.argv[:] = arguments
        runpy.run_path(kind, run_name="__main__")


def end_after(function: Callable[[], None]) -> None:
    """Ends the process as Python does after `function`, but does not take modules apart, which lasts seconds."""
    status = 0
    try:
        function()
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        traceback.print_exc()
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # which waits for the threads, as Python does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # which has been closed
            stream.flush()
    os._exit(status)


# The command that looks like Python ----------------------------------------------------------------------------------


def ask(path: str, arguments: list[str]) -> None:
    """Lets a process run, passes signals on to it, and ends as it ended."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        message = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [message], [0, 1, 2])
        connection.sendall(message[sent:])
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
        status = int(connection.makefile().readline())
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    task, path, *arguments = sys.argv[1:]
    if task == "serve":
        for name in arguments:
            importlib.import_module(name)
        request = serve(path)
        end_after(lambda: run(**request))
    else:
        ask(path, arguments)
