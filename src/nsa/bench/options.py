"""Options that several benches have, with their help."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

Heads = Annotated[int, arg(help="Query heads, H.")]
KVHeads = Annotated[int, arg(help="KV heads, HK.")]
HeadDim = Annotated[int, arg(help="Width of a head of q, k and v.")]
KeyDim = Annotated[int, arg(help="Width of a head of q and k.")]
ValueDim = Annotated[int | None, arg(metavar="INT", help="Width of a head of v. Default: that of q and k.")]
HiddenSize = Annotated[int, arg(help="Width of the hidden states.")]
Repetitions = Annotated[int, arg(help="Rounds that count, after one that does not.")]
Json = Annotated[bool, arg(help="Print the result as JSON instead of tables.")]
Output = Annotated[
    Path | None,
    arg(metavar="STEM", help="Write STEM.json after every measurement, STEM.md and STEM.svg at the end."),
]
