"""Calls in processes of their own, forked from a server that has imported what they need.

Importing torch and transformers takes seconds, and half a minute in a fresh environment. The server does it once for
all; who calls needs neither. Where forking is not safe (macOS, Windows) each process imports for itself.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

CAN_FORK = sys.platform == "linux"
CONTEXT = multiprocessing.get_context("forkserver") if CAN_FORK else multiprocessing.get_context("spawn")
# glibc hands freed memory back to the system and fetches it again, page by page, at every training step.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 33)}


def start_server(module: str) -> None:
    """Begin to import `module`, whose functions will be called."""
    if CAN_FORK:
        from multiprocessing import forkserver  # not on every system

        before = {name: os.environ.get(name) for name in KEEP_MEMORY}
        os.environ.update({name: value for name, value in KEEP_MEMORY.items() if before[name] is None})
        CONTEXT.set_forkserver_preload([module])
        forkserver.ensure_running()
        for name in (name for name, value in before.items() if value is None):
            del os.environ[name]


@dataclass
class Worker:
    """One call, under way; its process bears its name."""

    process: BaseProcess
    result: Connection

    @classmethod
    def start(cls, name: str, module: str, function: str, *arguments: Any) -> "Worker":
        receive, send = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_call, args=(module, function, arguments, send), name=name, daemon=True)
        process.start()
        send.close()
        return cls(process, receive)

    def is_done(self) -> bool:
        return self.result.poll() or not self.process.is_alive()

    def value(self) -> Any:
        """What the function returned; waits for it.

        Raises:
            ValueError, OSError: what it raised; OSError if the process ended by itself.
        """
        sent: Any = None
        with suppress(EOFError):
            sent = self.result.recv()
        self.process.join()
        if isinstance(sent, Exception):
            raise sent
        if sent is None:
            code = self.process.exitcode
            raise OSError(f"the process of {self.process.name} ended with exit code {code} before its work was done")
        return sent

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


def _call(module: str, function: str, arguments: tuple[Any, ...], result: Connection) -> None:
    # Ctrl-C reaches every process. The caller's alone counts, and stops all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    call: Callable[..., Any] = getattr(importlib.import_module(module), function)
    try:
        result.send(call(*arguments))
    except (ValueError, OSError) as error:
        result.send(error)


def _end_with_parent() -> None:
    """Nobody waits for a worker whose caller was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
