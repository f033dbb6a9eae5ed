"""Stages in which every query selects all blocks: dense attention in the selected branch, while the selector learns."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nsa.modules.layer import SparseLayer
from nsa.training.curriculum import Stage


class AllBlocks(TrainerCallback):
    """In a stage with `blocks=all`, layers have `with_all_blocks` of their configuration while a step is taken.

    So evaluation, and what is saved, see the model's own. Layers with other attention are as they are.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
        self._own = [(layer, layer.config) for layer in layers]
        self._ends = list(accumulate(stage.steps for stage in stages))
        self._of_stages = [
            [(layer, own.with_all_blocks(stage.length)) for layer, own in self._own] if stage.all_blocks else self._own
            for stage in stages
        ]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._give(self._of_stages[bisect_right(self._ends, state.global_step)])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        self._give(self._own)

    def _give(self, configs: list[tuple[SparseLayer, Any]]) -> None:
        for layer, config in configs:
            layer.take(config)
