"""Cases that several processes run together: one helper process imports, and forks each group of them.

    python groups.py RESULTS MODULES.. [--at-once]

Every function case_* of the modules with an attribute `sizes` runs in a group of each of these sizes; RESULTS becomes
JSON of "name/size" -> what went wrong on any rank, "" for nothing. The cases of a size share a group, one after
another; with --at-once each has a group of its own, and all of them run together.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent


def sizes(*numbers):
    """How many processes a case wants."""

    def mark(case):
        case.sizes = numbers
        return case

    return mark


def cases_of(*modules):
    named = [pair for module in modules for pair in vars(module).items()]
    found = {name.removeprefix("case_"): case for name, case in named if name.startswith("case_")}
    return {f"{name}/{size}": (case, size) for name, case in found.items() for size in case.sizes}


def run(*modules, at_once=False, **environment):
    """{"name/size": error} of all cases of the modules, in an environment with these variables besides."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = {
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)]),
        }
        command = [sys.executable, "-W", "ignore", str(HERE / "groups.py"), str(results), *modules]
        command += ["--at-once"] if at_once else []
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert results.exists(), finished.stderr
        return json.loads(results.read_text())


def _work(rank, size, cases, folder, number):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store, backend = f"file://{folder}/store-{number}", os.environ.get("NSA_TEST_BACKEND", "gloo")
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=90))
    for name, case in cases.items():
        log = Path(folder) / f"{name.replace('/', '-')}-{rank}"
        try:
            torch.manual_seed(0)
            case()
        except Exception:
            log.write_text(traceback.format_exc())
            raise
        log.write_text("")
    dist.barrier()
    dist.destroy_process_group()


def main():
    import torch.multiprocessing as mp

    results, at_once = Path(sys.argv[1]), "--at-once" in sys.argv
    names = [name for name in sys.argv[2:] if name != "--at-once"]
    cases, found = cases_of(*map(importlib.import_module, names)), {}
    if at_once:
        groups = [(size, {name: case}) for name, (case, size) in cases.items()]
    else:
        of_size = {size: {} for size in sorted({size for _, size in cases.values()})}
        for name, (case, size) in cases.items():
            of_size[size][name] = case
        groups = list(of_size.items())
    running = []
    for number, (size, chosen) in enumerate(groups):
        arguments = (size, chosen, str(results.parent), number)
        running.append(mp.start_processes(_work, arguments, nprocs=size, join=False, start_method="fork"))
        if not at_once:
            _join(running.pop())
    for group in running:
        _join(group)
    for name, (_, size) in cases.items():
        logs = [results.parent / f"{name.replace('/', '-')}-{rank}" for rank in range(size)]
        said = [log.read_text() if log.exists() else "it did not come to its end" for log in logs]
        found[name] = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)
    results.write_text(json.dumps(found))


def _join(group):
    """Until all its processes have ended; where one fails, the others are ended."""
    import torch.multiprocessing as mp

    with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
        while not group.join():
            pass


if __name__ == "__main__":
    main()
