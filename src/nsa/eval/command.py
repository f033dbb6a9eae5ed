"""The arguments of `nsa eval` and `nsa demo`; the work is imported when it is run, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class EvalArguments:
    """Judge models at long context: needle, recall, perplexity by position; twins side by side.

    Examples:
        nsa eval runs/nsa runs/dense runs/window --output runs/judged
        nsa eval runs/nsa --tasks needle --lengths 1024 4096 --depths 0 0.5 1 --samples 50
        nsa eval runs/nsa --tasks perplexity --text ~/novels --json > loss.json
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")]
    """Folders of models, from `nsa train` or save_pretrained."""
    tasks: tuple[str, ...] = ("needle", "recall", "perplexity")
    """Which tasks: needle, recall, perplexity, multivalue, continuation; of RULER's kinds noise, multikey, multiquery,
    tracking, commonwords, frequentwords; mqar."""
    lengths: tuple[int, ...] = ()
    """Lengths in tokens; the longest one is that of recall, perplexity, multivalue and continuation. Default: 1/4, 1/2
    and all of the models' positions."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where needles lie: 0 is the text's start, 1 right before the question."""
    samples: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Samples in each cell. Default: each task's own."""
    keys: int = 4
    """Values in a text of recall, of which one is asked for."""
    hops: tuple[int, ...] = (1, 2)
    """Hops from a question of recall to the value."""
    window_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Window by which recall tells near from far. Default: the models' own."""
    seed: int = 0
    """Decides all prompts."""
    text: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A file or folder of text that the models have not seen. Default: what their training held out."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder for eval.json and report.html."""
    overwrite: bool = False
    """Replace the results in --output."""
    json: bool = False
    """Print the result as JSON instead of a table."""
    device: str = "auto"
    """Where to run: auto (CUDA if there is a GPU), cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the models."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings, as some models need."""

    def run(self) -> None:
        from nsa.eval.runner import judge

        judge(self)


@dataclass(frozen=True)
class DemoArguments:
    """Train NSA and its dense and window-only twins on this machine, judge them, write report.html."""

    output: Path = Path("nsa-demo")
    """Folder for the models, demo.json and report.html. A run that was stopped goes on where it was."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Training steps of each twin. Default: the demo's recipe."""
    seed: int = 0
    """Decides data, initial weights and prompts."""
    processes: int = 0
    """How many twins to train at once; 0: as many as there are cores."""
    overwrite: bool = False
    """Start again although there are results in --output."""

    def run(self) -> None:
        from nsa.eval.demo import demo

        demo(self)
