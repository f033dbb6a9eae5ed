"""Methods under any Hugging Face decoder of the Llama family, through transformers' own registration.

    with attached(model):
        model.generate(**inputs, past_key_values=MethodCache(Quest(), model))

The attention function and the mask function are registered under one name; the cache brings the method, and holds
one `Sequence` for each layer and each row of the batch. Rows are taken apart and padding is left out, so that a row
gives the numbers it gives alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import flash_attention_mask

from nsa.eval.methods.method import PHASES, Method
from nsa.eval.methods.sequence import Counts, Reads, Sequence

KEY = "nsa_method"


class MethodCache(Cache):
    """The cache of one generation with a method; `counts` says what was read.

    Args:
        method: how to attend.
        model: whose layers and rotary frequencies to use.

    Raises:
        ValueError: if the model's attention is not Llama's (an NSA model, or its window twin).
    """

    def __init__(self, method: Method, model: nn.Module) -> None:
        config: Any = model.config
        if getattr(config, "attention", "dense") != "dense":
            raise ValueError(f"{method.name} replaces full attention; this model has attention={config.attention!r}")
        inv_freq = next((buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")), None)
        self.method = method
        self.counts = Counts([{phase: Reads() for phase in PHASES} for _ in range(config.num_hidden_layers)])
        layers = [_Layer(method, i, inv_freq, reads) for i, reads in enumerate(self.counts.layers)]
        super().__init__(layers=layers)

    def num_bytes(self) -> int:
        """Bytes of all keys, values and states remembered."""
        return sum(row.num_bytes() for layer in self.layers for row in layer.rows)


class _Layer(DynamicLayer):
    """One layer: transformers counts columns, padding included; each row's `Sequence` holds tokens only."""

    def __init__(self, method: Method, index: int, inv_freq: Tensor | None, reads: dict[str, Reads]) -> None:
        super().__init__()
        self.method, self.index, self.inv_freq, self.reads = method, index, inv_freq, reads
        self.reset()

    def reset(self) -> None:
        self.rows: list[Sequence] = []
        self.num_columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update knows shapes, dtype and device."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are; the attention function finds this layer by them."""
        if not self.rows:
            self.rows = [Sequence(self.index, self.inv_freq, self.reads) for _ in range(len(key_states))]
        self.num_columns += key_states.shape[2]
        key_states = key_states.view_as(key_states)
        key_states.method_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.num_columns

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        if int(tokens_to_remove):
            raise ValueError(f"{self.method.name}: tokens cannot be taken back from a method's cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.rows = [self.rows[i].copy() for i in beam_idx.tolist()] if self.rows else []

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows = [row.copy() for row in self.rows for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(len(self.rows), device=indices.device)[indices])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function: query [b, h, t, d], new keys and values [b, g, t, d], mask None or [b, columns].

    Returns:
        [b, t, h, d], zero where there is padding; and None for the weights.
    """
    layer: _Layer | None = getattr(key, "method_layer", None)
    if layer is None:
        raise ValueError(f"attention {KEY!r} needs past_key_values=MethodCache(method, model)")
    if sliding_window is not None and layer.num_columns > sliding_window:
        raise ValueError(
            f"{layer.method.name} replaces full attention; layer {layer.index} has a sliding window of "
            f"{sliding_window} and the text {layer.num_columns} tokens"
        )
    b, h, t, _ = query.shape
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"{layer.method.name}: expected an attention_mask [b, s], got {list(attention_mask.shape)}")
    out = query.new_zeros(b, t, h, value.shape[-1])
    for row, sequence in enumerate(layer.rows):
        q, k, v = query[row], key[row], value[row]
        columns = None
        if attention_mask is not None:
            columns = attention_mask[row, attention_mask.shape[1] - t :].nonzero()[:, 0]
            q, k, v = (x.index_select(1, columns) for x in (q, k, v))
        if not q.shape[1]:
            continue
        sequence.phase = "decode" if t == 1 and sequence.length else "prefill"
        sequence.scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        sequence.reads[sequence.phase].queries += q.shape[1]
        sequence.append(k, v)
        step = layer.method.decode if sequence.phase == "decode" else layer.method.prefill
        out[row, slice(None) if columns is None else columns] = step(q, sequence).transpose(0, 1)
    return out, None


@contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """Within it, the model's attention is that of the MethodCache it is called with."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation(KEY)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


AttentionInterface.register(KEY, attention)
AttentionMaskInterface.register(KEY, flash_attention_mask)
