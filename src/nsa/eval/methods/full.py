"""Full attention, the dense twin: what every method approximates."""

from dataclasses import dataclass
from typing import ClassVar

from nsa.eval.methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Every query reads every key before it, through torch's SDPA, in both phases."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    sparse_in: ClassVar[tuple[str, ...]] = ()
