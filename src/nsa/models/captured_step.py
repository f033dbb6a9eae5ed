"""A decoding step of the whole model at fixed addresses, and its CUDA graph.

A step takes one to two milliseconds of some 150 small kernels, which the host launches ten times more slowly than the
device runs them. Captured once, the step is one launch. What is captured is `CapturedStep.step`: from token ids in a
buffer to logits in a buffer, over the cache's memory; nothing in it asks the host. `CapturedStep.__call__` is what
stays outside: room in the cache, ids into the buffer, logits out of it.
"""

from typing import Any

import torch
from torch import Tensor

from nsa.models.cache import NSALlamaCache
from nsa.models.step import StepDecoder


class CapturedStep:
    """Decoding steps of one token a row, over one static or paged cache, with the weights of the moment it was made.

    The first step runs as it is, on a stream of its own: it compiles kernels and sets libraries up, which no capture
    may do. The second is captured and replayed, as are all after it.

    Args:
        model: an NSALlamaForCausalLM with attention="nsa".
        cache: with memory; its addresses must stay, see `serves`.
        masked: whether steps come with an attention mask, by which rows may sit a step out.
        capture: False runs every step as it is, on any device.
    """

    def __init__(self, model: Any, cache: NSALlamaCache, *, masked: bool, capture: bool = True) -> None:
        cache.check_config(model.config)
        self.model, self.cache, self.capture = model, cache, capture
        self.tensors = [layer.tensors for layer in cache.fixed]
        lengths = self.tensors[0].lengths
        with torch.inference_mode(False):  # later steps may come in another mode
            self.ids = torch.zeros(len(lengths), 1, dtype=torch.long, device=lengths.device)
            self.counts = torch.ones_like(lengths) if masked else None
        self.autocast = _autocast_of(lengths)
        self.decoder = StepDecoder.of(model.model)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.steps, self.is_warm = 0, False

    def serves(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether this step is the captured one: as many rows, a mask or none, the memory where it was, one dtype."""
        same_memory = all(
            layer.tensors is tensors for layer, tensors in zip(self.cache.fixed, self.tensors, strict=True)
        )
        same_mask = (attention_mask is None) == (self.counts is None)
        same_dtype = self.autocast == _autocast_of(self.ids)
        return same_memory and same_mask and same_dtype and input_ids.shape == self.ids.shape

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [rows, 1, vocabulary] after one more token a row.

        Raises:
            ValueError: no room in the cache, which is then what it was.
        """
        if self.graph is not None:
            with self.cache.bounds_if_it_raises():
                self._prepare(input_ids, attention_mask)
                self.graph.replay()
            return self._replayed()
        with self.cache.transaction():
            self._prepare(input_ids, attention_mask)
            if not self.capture:
                return self.step()
            if not self.is_warm:
                logits = self._on_the_side()
                self.is_warm = True
                return logits
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self.step()
            graph.replay()
            self.graph = graph
        return self._replayed()

    def _prepare(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if self.counts is not None and attention_mask is not None:
            torch.ne(attention_mask[:, -1], 0, out=self.counts)
        self.cache.make_room(1, self.counts)
        self.ids.copy_(input_ids)
        self.steps += 1

    def _replayed(self) -> Tensor:
        assert self.logits is not None
        return self.logits.clone()  # the next step writes into it

    def step(self) -> Tensor:
        """The step itself, all of it on the device."""
        enabled, dtype = self.autocast
        # Weights that autocast has cast go with its block; a captured step would read on where they were.
        with torch.autocast(self.ids.device.type, dtype, enabled=enabled, cache_enabled=False):
            if self.decoder is not None:
                hidden = self.decoder(self.ids, self.tensors, self.counts)
            else:  # the model's modules do the same
                hidden = self.model.model.decode(self.ids, self.cache, self.counts)
            return self.model.lm_head(hidden)

    def _on_the_side(self) -> Tensor:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            logits = self.step()
        here.wait_stream(side)
        logits.record_stream(here)
        return logits


def _autocast_of(x: Tensor) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for x's device, and its dtype."""
    device = x.device.type
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
