"""Command lines and files as careless or hostile users give them; every case follows from its number alone."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import split
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.bench.result import Entry, Result
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.tokenizer import byte_tokenizer

SIZES = {"vocab_size": 259, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4,
         "num_hidden_layers": 1, "num_key_value_heads": 1, "max_position_embeddings": 128}  # fmt: skip
NSA = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4,
       "window_size": 16}  # fmt: skip

# Nothing large: what is asked for is done, and this is no test of patience.
VALUES = ["", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e999", "x", "None", "true", "[]", "é", "\udcff", "-",
          "--", "[/b]", "a b", "cuda", "cuda:9", "meta", "..", "/dev/null", "/proc/self/mem", "no/such",
          "~/x", "~no-such-user/x", "a\nb", "0" * 300]  # fmt: skip
JSON_VALUES = [None, True, -1, 0, 1, 3, 1.5, float("nan"), float("inf"), "", "x", "\ud800", [], {}, [None], {"x": 1}]

EVAL = split("--tasks needle --lengths 64 --depths 0.5 --samples 1")
COMPARE = split("--methods full --tasks needle --lengths 64 --depths 0.5 --samples 1")
ADAPT = split("--first 32x1 --second 32x1 --batch-tokens 32 --eval-tokens 64 --max-bytes 4000 --quiet --device cpu")
CONVERT = split(
    "--nsa.compress-block-size 8 --nsa.compress-stride 4 --nsa.select-block-size 8 --nsa.num-selected-blocks 4 "
    "--nsa.window-size 16"
)
TRAIN = split(
    "--curriculum 32x1 --batch-tokens 32 --hidden-size 8 --intermediate-size 8 --num-layers 1 --num-heads 2 "
    "--num-kv-heads 1 --max-bytes 4000 --eval-tokens 64 --quiet --device cpu"
)
FLAGS = split(
    "--device --dtype --depths --hops --keys --window-size --seed --text --output --tasks --budget --decode --values "
    "--chat --methods --context --batch --gpu --bandwidth --prefill-chunk --temperature --top-p --num-beams "
    "--learning-rate --preset --tokenizer --layout --nsa.window-size --nsa.compression --warmup-steps --beta2 "
    "--weight-decay --resume --rope-theta --keep-checkpoints --save-every --log-every --eval-every --accumulation "
    "--json --heads --kv-heads --rivals --repetitions --steps --processes --wheel --odd --help -h --traceback= "
    "--layers --tokens --gate-bias"
)


def lines_of(folder: Path) -> dict[str, list[list[str]]]:
    """Command lines that work (bench aside), small ones."""
    at = {name: str(folder / name) for name in ("nsa", "llama", "out", "rows", "demo", "a.whl", "a.npy", "bench.json")}
    text = ["--text", str(folder / "text")]
    return {
        "eval": [
            [at["nsa"], *EVAL, *text],
            [at["llama"], at["nsa"], *EVAL, *text, "--json"],
            [at["llama"], *EVAL, "--output", at["out"]],
        ],
        "report": [[at["nsa"], "--output", at["out"]], [at["nsa"], "--json"], [at["nsa"], "--eval", at["bench.json"]]],
        "compare": [[at["llama"], *COMPARE, *text, "--output", at["rows"]]],
        "adapt": [
            [at["nsa"], "--dense", at["llama"], "--out", at["out"], "--data", str(folder / "text"), *ADAPT, *more]
            for more in (["--second"], ["--first"], ["--lora", "1"])
        ],
        "convert": [
            [at["llama"], at["out"], *CONVERT, "--tokens", "0"],
            [at["llama"], at["out"], *CONVERT, *text, "--tokens", "64", "--layers", "0", "--gate-bias", "30"],
            [at["nsa"], at["out"]],
        ],
        "fetch": [["smollm2", "--output", at["out"], "--wheel", at["a.whl"]], ["--output", at["out"]]],
        "bench": [
            *(["show", at["bench.json"], *more] for more in ([], ["--output", at["out"]])),
            *([kind, "--repetitions", "1"] for kind in ("kernels", "module", "step", "decode", "generate")),
        ],
        "demo": [["--output", at["demo"]], ["--output", at["out"], "--steps", "8", "--processes", "1"]],
        "info": [[at["nsa"]], [at["llama"], "--context", "4096", "--json"], ["1b"]],
        "generate": [
            [at["nsa"], "--prompt", "import", "--max-new-tokens", "2"],
            [at["llama"], "--prompt", "-", "--max-new-tokens", "2"],
        ],
        "train": [["--data", data, "--out", at["out"], *TRAIN] for data in (str(folder / "text"), at["a.npy"])],
    }


def write_files(folder: Path) -> None:
    """All that the command lines name."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "llama")
    NSALlamaForCausalLM(NSALlamaConfig(**SIZES, nsa=NSA)).save_pretrained(folder / "nsa")
    for name in ("llama", "nsa"):
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "nsa" / "train_config.json").write_text('{"data": "python", "nsa": {}}')
    (folder / "nsa" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "seconds": 0.5, "tokens": 32, "eval_text_loss": 2.25}\n'
    )
    (folder / "text").mkdir()
    (folder / "text" / "words.txt").write_text("one of the lines of a text\n" * 300)
    (folder / "a.whl").write_bytes(b"PK")
    (folder / "a.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (2000,), }"
    )
    entry = Entry(length=8, inputs="random", part="forward", ms={"NSA": 1.0, "cuDNN": 2.0}, flops={"NSA": 1e9})
    result = Result(bench="module", facts={"device": "a"}, shape={"heads": 1}, matrix_rate=1e12, entries=[entry])
    (folder / "bench.json").write_text(result.to_json())
    (folder / "demo" / "nsa").mkdir(parents=True)
    (folder / "demo" / "demo.json").write_text('{"table": {}, "sample": {}}')
    (folder / "demo" / "nsa" / "train_config.json").write_text('{"data": "python"}')
    (folder / "rows").mkdir()
    (folder / "rows" / "rows.jsonl").write_text('{"key": "x", "status": "ok"}\n')


@dataclass
class Case:
    """One call of the command, and the bytes on its standard input."""

    arguments: list[str]
    stdin: bytes
    changed: list[str]

    def __str__(self) -> str:
        return f"{self.arguments} after {self.changed or 'nothing'}, with {self.stdin!r} on standard input"


def make(number: int, templates: Path, folder: Path) -> Case:
    """Case `number`, in a fresh `folder` that gets its own copy of the files."""
    rng = random.Random(number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(templates, folder)
    lines = lines_of(folder)
    command = rng.choice(list(lines))
    line = list(rng.choice(lines[command]))
    changed = []
    if rng.random() < 0.6:
        for _ in range(rng.choice((1, 1, 2))):
            _change_arguments(rng, line)
    if rng.random() < 0.6:
        named = [Path(word) for word in line if word.startswith(str(folder)) and Path(word).exists()]
        files = sorted({file for path in named for file in (path, *path.rglob("*")) if file.is_file()})
        for file in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
            kind = rng.choice(list(DAMAGES))
            DAMAGES[kind](rng, file)
            changed.append(f"{kind}: {file.relative_to(folder)}")
    return Case([command, *line], rng.choice((b"import", b"", b"\xff\xfe", b"\0", b"\xed\xa0\x80")), changed)


def _change_arguments(rng: random.Random, line: list[str]) -> None:
    if not line:
        line.append(rng.choice(FLAGS))
    place = rng.randrange(len(line))
    kind = rng.choice(("value", "value", "value", "drop", "twice", "add", "swap"))
    if kind == "value":
        values = [i for i, word in enumerate(line) if not word.startswith("--")] or [place]
        line[rng.choice(values)] = rng.choice(VALUES)
    elif kind == "drop":
        del line[place]
    elif kind == "twice":
        line.insert(place, line[place])
    elif kind == "swap":
        other = rng.randrange(len(line))
        line[place], line[other] = line[other], line[place]
    else:
        line[place:place] = [rng.choice(FLAGS), rng.choice(VALUES)][: rng.choice((1, 2))]


# ---- files ---------------------------------------------------------------------------------------------------------


def _cut(rng: random.Random, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def _flip(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 20))):
        if content:  # the beginning is where the headers are
            content[rng.randrange(min(len(content), rng.choice((16, 400, 1 << 20))))] = rng.randrange(256)
    file.write_bytes(content)


def _noise(rng: random.Random, file: Path) -> None:
    file.write_bytes(rng.randbytes(rng.choice((1, 8, 100, 3000))))


def _nest(rng: random.Random, file: Path) -> None:
    file.write_text(rng.choice("[{") * 3000)


def _value(rng: random.Random, file: Path) -> None:
    """Another value somewhere in its JSON; other files are cut."""
    try:
        root = {"all": json.loads(file.read_text(encoding="utf-8"))}
    except ValueError:
        return _cut(rng, file)
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting and len(places) < 200:
        node = waiting.pop(0)
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.3 and node is not root:
        del node[key]
    else:
        node[key] = rng.choice(JSON_VALUES)
    file.write_text(json.dumps(root["all"]), encoding="utf-8")
    return None


def _folder(rng: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def _loop(rng: random.Random, file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


DAMAGES: dict[str, Callable[[random.Random, Path], None]] = {
    "cut": _cut,
    "bytes changed": _flip,
    "noise": _noise,
    "deep": _nest,
    "a value": _value,
    "another value": _value,
    "removed": lambda rng, file: file.unlink(),
    "empty": lambda rng, file: file.write_bytes(b""),
    "a folder": _folder,
    "a loop of links": _loop,
}
