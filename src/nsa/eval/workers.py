"""Processes of the demo: forked from a server that has imported what they need.

Importing torch and transformers takes seconds, and half a minute in a fresh environment. The server does it once for
all, beside this process' own imports. Where forking is not safe (macOS, Windows) each process imports for itself.
"""

import multiprocessing
import sys

CAN_FORK = sys.platform == "linux"
CONTEXT = multiprocessing.get_context("forkserver") if CAN_FORK else multiprocessing.get_context("spawn")


def start_server() -> None:
    """Begin the server's imports now; a process started later waits for what is left of them."""
    if CAN_FORK:
        from multiprocessing import forkserver  # not on every system

        CONTEXT.set_forkserver_preload(["nsa.eval.twins"])
        forkserver.ensure_running()
