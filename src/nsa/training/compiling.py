"""torch.compile of a model for training, and CUDA graphs of what it makes.

A training step of a small model is more than a thousand launches, which the host starts more slowly than the device
finishes them. A CUDA graph starts them all at once: one graph a shape, recorded when the shape is met the second time.
"""

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import nn

# How many documents, and a bound on their length: of a model's arguments, and of what its layers share.
VARYING = ("cu_seq_lens_q", "max_length_q", "cu_seqlens", "max_seqlen")
PARTS = ("model", "chunked_loss")  # of a language model
NOTICE = "torch.compile: the first step with each kind of rows takes a minute or two on a GPU"


def compiled_parts(model: nn.Module, *, cuda_graphs: bool) -> dict[str, Any]:
    """All layers as one graph, and the loss as another; a second length of rows makes them serve any."""
    return {name: torch.compile(getattr(model, name), **_options(cuda_graphs)) for name in PARTS}


def compile_parts(model: nn.Module, *, on_cpu: bool, cuda_graphs: bool) -> None:
    """The same in place: whoever calls a part calls what was compiled.

    Raises:
        ValueError: torch.compile lacks what it needs here.
    """
    _check_compiler(on_cpu=on_cpu)
    for name in PARTS:
        getattr(model, name).compile(**_options(cuda_graphs and not on_cpu))


def compile_layers(model: nn.Module, *, on_cpu: bool) -> None:
    """Each layer as a graph of its own, and the loss if it is a part.

    Layers that are alike share what was compiled for one.

    Raises:
        ValueError: torch.compile lacks what it needs here.
    """
    _check_compiler(on_cpu=on_cpu)
    decoder: Any = model.model
    loss = getattr(model, "chunked_loss", None)
    for part in (*decoder.layers, *([] if loss is None else [loss])):
        part.compile()


def compile_between_hooks(model: nn.Module, *, on_cpu: bool) -> None:
    """The same of a model that FSDP is to shard: its hooks, which gather a layer's weights, stay outside of the graph.

    Raises:
        ValueError: torch.compile lacks what it needs here.
    """
    _check_compiler(on_cpu=on_cpu)
    language_model: Any = model
    for layer in language_model.model.layers:
        layer.forward = torch.compile(layer.forward, **_options(cuda_graphs=False))
    language_model.chunked_loss.compile(**_options(cuda_graphs=False))


def _check_compiler(*, on_cpu: bool) -> None:
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if on_cpu and not any(map(shutil.which, compilers)):
        raise ValueError(f"--compile: on a CPU it needs a C++ compiler, found none of {', '.join(compilers)}")
    if not on_cpu and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile: torch.compile needs triton on a GPU, and it is not installed; or --no-compile")


def begin_step() -> None:
    """What the graphs of the pass before have put out may be overwritten from now on."""
    torch.compiler.cudagraph_mark_step_begin()


def own_gradients(model: nn.Module) -> None:
    """Move gradients out of the graphs' memory, which the next pass takes again."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def _options(cuda_graphs: bool) -> dict[str, Any]:
    """torch.compile's. What differs from one packed batch to the next is a variable from the first graph on."""
    torch.compiler.config.dynamic_sources = ",".join(f".*{name}.*" for name in VARYING)
    return {"mode": "reduce-overhead"} if cuda_graphs else {}
