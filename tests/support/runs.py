"""A tiny run that tests train, stop, damage and continue."""

import torch
from transformers import TrainerCallback

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.training.config import TrainConfig


class At(TrainerCallback):
    """Do something to the model when a step is over."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            self.act(model)


@torch.no_grad()
def poison(model):
    model.model.norm.weight[0] = float("nan")


def interrupt(model):
    raise KeyboardInterrupt


def tiny(text, folder):
    return TrainConfig(
        out=folder / "run",
        data=str(text),
        cache_dir=folder / "cache",
        curriculum=("32x4:repeated=0.5", "64x8:retrieval=0.5"),
        answer_weight=3.0,
        batch_tokens=128,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=32,
        nsa=NSAConfig(
            compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=16
        ),
        infllm_v2=InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=4, dense_len=16),
        eval_every=4,
        eval_tokens=128,
        save_every=4,
        log_every=2,
        device="cpu",
        quiet=True,
    )
