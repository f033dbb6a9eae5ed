"""The two stages as Trainers; evaluation is the text's loss, as in any run."""

from typing import Any

import torch
from torch import Tensor

from nsa.adapting.layers import layer_loss
from nsa.adapting.predictions import loss_of_part, taught_loss
from nsa.training.compiling import compile_layers
from nsa.training.trainer import WholeCheckpointTrainer


class LayerTrainer(WholeCheckpointTrainer):
    """Stage 1."""

    def __init__(self, *, dense: Any, weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense, self.weight = dense.to(self.args.device), weight

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return layer_loss(model, self.dense, inputs["input_ids"], self.weight) / self.args.gradient_accumulation_steps


class TaughtTrainer(WholeCheckpointTrainer):
    """Stage 2."""

    def __init__(self, *, dense: Any, weight: float, compile: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense, self.weight = dense.to(self.args.device), weight
        self.part = torch.compile(loss_of_part) if compile else loss_of_part
        if compile:
            compile_layers(self.dense, on_cpu=self.args.use_cpu)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *args: Any, num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not model.training or not self.weight:
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        return taught_loss(model, self.dense, inputs["input_ids"], self.weight, num_items_in_batch, self.part)
