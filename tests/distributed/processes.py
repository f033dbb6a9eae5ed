"""Runs of `nsa train` by several processes: this one imports, and forks the ranks of each run as torchrun starts them.

    python processes.py RUNS RESULTS

RUNS is JSON: a list of {name, ranks, arguments, of_rank, kill, poison, interrupt, copy, write}; so is RESULTS: {name:
[{code, said}]}.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent


def run(runs, folder):
    """{name: [{"code": exit code, "said": stderr} of each rank]}."""
    (folder / "runs.json").write_text(json.dumps(runs))
    path = os.pathsep.join([*sys.path, str(HERE), str(HERE.parent / "training")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", str(HERE / "processes.py"), "runs.json", "results.json"]
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert (folder / "results.json").exists(), finished.stderr
    return json.loads((folder / "results.json").read_text())


def main():
    import nsa.training.train  # noqa: F401  # before the forks

    results = {}
    for one in json.loads(Path(sys.argv[1]).read_text()):
        if "copy" in one:
            shutil.copytree(*one["copy"])
        if "write" in one:
            path, text = one["write"]
            Path(path).write_text(text)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = [_fork(one, rank, port) for rank in range(one["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        said = [Path(f"{one['name']}-{rank}.err").read_text() for rank in range(one["ranks"])]
        results[one["name"]] = [{"code": code, "said": text} for code, text in zip(codes, said, strict=True)]
    Path(sys.argv[2]).write_text(json.dumps(results))


def _fork(one, rank, port):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(f"{one['name']}-{rank}.err", "w") as file:
            os.dup2(file.fileno(), 2)
        if one["ranks"] > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(one["ranks"]),
                "LOCAL_WORLD_SIZE": str(one["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        _act(one, rank)
        from nsa.cli import main as command

        code = command(["train", *one["arguments"], *one.get("of_rank", {}).get(str(rank), [])])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _act(one, rank):
    """Kill a rank, make its weights NaN, or press Ctrl-C there twice, after a step."""
    from runs import At

    import nsa.training.train as module

    def kill(model):
        os.kill(os.getpid(), signal.SIGKILL)

    def interrupt(model):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    acts = {"kill": kill, "poison": poison_part, "interrupt": interrupt}
    callbacks = [At(one[name][1], act) for name, act in acts.items() if name in one and one[name][0] == rank]
    train = module.train
    module.train = lambda config: train(config, callbacks=callbacks)


def poison_part(model):
    import torch

    with torch.no_grad():
        model.model.norm.weight.to_local().fill_(float("nan"))


if __name__ == "__main__":
    main()
