"""What a benchmark found, as JSON and back."""

import json
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Times (ms) and peaks (GiB) of the candidates at one length; `part` is forward, backward, step or kernels."""

    length: int
    inputs: str
    part: str
    ms: dict[str, float]
    gib: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)  # the least each candidate has to compute
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run of `nsa bench`: where, when, what of, and its entries."""

    bench: str
    facts: dict[str, Any]
    shape: dict[str, Any]
    matrix_rate: float  # FLOP/s, measured in the same run
    entries: list[Entry] = field(default_factory=list)

    def of(self, part: str, inputs: str | None = None) -> list[Entry]:
        return [x for x in self.entries if x.part == part and inputs in (None, x.inputs)]

    def to_json(self) -> str:
        """One entry a line, so that a result kept in a repository is short and its changes can be read."""
        values = asdict(self)
        entries = ",\n".join(json.dumps(entry) for entry in values.pop("entries"))
        return json.dumps(values, indent=1)[:-2] + f',\n "entries": [\n{entries}\n ]\n}}'

    @staticmethod
    def from_json(text: str) -> "Result":
        found = json.loads(text)
        return Result(**{**found, "entries": [Entry(**entry) for entry in found["entries"]]})


def when_and_where() -> dict[str, str]:
    """Today, and the commit of the source tree if it is one."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() if done.returncode == 0 else "unknown"
    except OSError:
        commit = "unknown"
    return {"date": date.today().isoformat(), "commit": commit or "unknown"}
