"""Twins and ablations at the small size, each a run of `nsa train` on the same tokens: what docs/results.md tells of.

    nsa corpus --output corpus
    python benchmarks/ablations.py --data corpus --out runs                    # all of them, one after the other
    python benchmarks/ablations.py --data corpus --out runs --rows nsa dense   # two of them
    python benchmarks/ablations.py --out runs --table                          # what is finished

A run that is there already is left alone, one that was stopped goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from nsa.eval.files import read_records
from nsa.training.folder import is_trained, last_checkpoint

SHORT_ROWS, LONG_ROWS = "repeated=0.1:retrieval=0.1:puzzles=0.2", "retrieval=0.05:puzzles=0.1"
Flags = dict[str, tuple[str, ...]]
COMMON: Flags = {
    "preset": ("small",),
    "curriculum": (f"512x600:{SHORT_ROWS}", f"4096x2600:{LONG_ROWS}"),
    "accumulation": ("1",),
    "answer-weight": ("3",),
    "selector-loss": ("0",),
    "eval-every": ("800",),
    "save-every": ("0",),
    "log-every": ("20",),
}
GATES: Flags = {"compressed-gate-bias": ("-4",), "selected-gate-bias": ("4",), "window-gate-bias": ("-4",)}
SELECTOR: Flags = {"selector-loss": ("0.5",)}
FOUR: Flags = {"nsa.compress-block-size": ("4",), "nsa.compress-stride": ("4",)}
SHORT: Flags = {"curriculum": (f"512x1400:{SHORT_ROWS}", f"4096x1800:{LONG_ROWS}")}
ALL_FIRST: Flags = {
    "curriculum": (f"512x1400:{SHORT_ROWS}", f"4096x800:{LONG_ROWS}:blocks=all", f"4096x1000:{LONG_ROWS}")
}
LONG: Flags = {
    "curriculum": (
        f"512x1400:{SHORT_ROWS}",
        *(f"{stage}:{LONG_ROWS}" for stage in ("4096x1200", "16384x300", "65536x150")),
    ),
    "rope-theta": ("500000",),
}
ROWS: dict[str, Flags] = {
    "dense": {"attention": ("dense",)},
    "window": {"attention": ("window",)},
    "nsa": {},
    "nsa-shared": {"nsa.shared-kv": ()},
    "nsa-gates": GATES,
    "nsa-selector": SELECTOR,
    "nsa-gates-selector": GATES | SELECTOR,
    "infllm_v2": {"attention": ("infllm_v2",)},
    "dense-short": {"attention": ("dense",)} | SHORT,
    "nsa-selector-short": SELECTOR | SHORT,
    "nsa-selector-short-fine": SELECTOR | SHORT | {"nsa.compress-block-size": ("8",)},
    "nsa-selector-short-four": SELECTOR | SHORT | FOUR,
    "nsa-selector-short-shared": SELECTOR | SHORT | {"nsa.shared-kv": ()},
    "nsa-selector-short-gates": SELECTOR | SHORT | GATES,
    "nsa-selector-all-first": SELECTOR | ALL_FIRST,
    "nsa-selector-all-first-gates": SELECTOR | ALL_FIRST | GATES,
    "nsa-selector-all-first-gates-four": SELECTOR | ALL_FIRST | GATES | FOUR,
    "nsa-selector-all-first-gates-four-queries": SELECTOR | ALL_FIRST | GATES | FOUR | {"selector-queries": ("2048",)},
    "dense-long": {"attention": ("dense",)} | LONG,
    "nsa-selector-long": SELECTOR | LONG,
    "nsa-selector-dense": SELECTOR | {"dense-layers": ("3", "7")},
    "nsa-all-blocks": {"nsa.num-selected-blocks": ("128",)},
    "nsa-phi-mean": {"nsa.compression": ("mean",)},
    "nsa-phi-linear": {"nsa.compression": ("linear",)},
    "nsa-halves": {"nsa.select-block-size": ("16",), "nsa.num-selected-blocks": ("32",)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python")
    parser.add_argument("--out", type=Path, required=True, help="a folder; every run has one in it, NAME-seedSEED")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="train nothing; print the last evaluation of every run")
    arguments, others = parser.parse_known_args()
    for seed in arguments.seeds:
        for row in arguments.rows:
            out = arguments.out / f"{row}-seed{seed}"
            if not arguments.table and not is_trained(out):
                flags = ["--data", arguments.data, "--seed", str(seed), *flags_of(row), *others]
                flags += [] if last_checkpoint(out) is None else ["--resume"]
                done = subprocess.run([sys.executable, "-m", "nsa", "train", "--out", str(out), *flags])
                if done.returncode:
                    sys.exit(done.returncode)  # nsa train has said why
    print(table(arguments.out))


def flags_of(row: str) -> list[str]:
    return [word for name, values in (COMMON | ROWS[row]).items() for word in (f"--{name}", *values)]


def table(folder: Path) -> str:
    """Of every run the last losses that were evaluated, and its speed."""
    lines = ["| run | tokens | held-out loss | answers' loss | tokens/s |", "|---|---|---|---|---|"]
    for file in sorted(folder.glob("*/metrics.jsonl")):
        known: dict[str, float] = {}
        for record in read_records(file):
            known |= record
        columns = {"tokens": ",.0f", "eval_text_loss": ".4f", "eval_retrieval_loss": ".4f", "tokens_per_second": ",.0f"}
        cells = [format(known[name], form) if name in known else "" for name, form in columns.items()]
        lines.append(f"| {file.parent.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
