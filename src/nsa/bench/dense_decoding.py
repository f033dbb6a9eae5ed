"""The dense twin's decoding step as a CUDA graph over exactly the keys that there are."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.models import NSALlamaForCausalLM
from nsa.models.step import StepLayer, norm, operations_for

BACKENDS = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


class DenseDecoder:
    """Steps of one token a row at position length - 1, over random keys and values before it.

    A captured graph knows one length; the step is repeated at that length. Dense attention over a longer buffer under a
    mask, as a graph for every length would need it, takes longer. Products and norms are those of NSA's step;
    embedding, rotation and the writing of k and v are PyTorch's. Each backend gets the heads in the form in which it is
    faster, every key read once: cuDNN by enable_gqa, FlashAttention-2 with a group as the queries of its KV head.
    """

    def __init__(
        self, model: NSALlamaForCausalLM, batch: int, length: int, backend: SDPBackend, *, capture: bool = True
    ) -> None:
        self.model, self.length, self.backend = model, length, backend
        config = model.config
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys_and_values = torch.empty(shape, dtype=model.dtype, device=model.device).normal_()
        self.layers = [StepLayer(layer) for layer in model.model.layers]
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.step()

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [rows, 1, vocabulary]."""
        self.ids.copy_(input_ids)
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return self.logits.clone()

    @torch.no_grad()
    def step(self) -> Tensor:
        decoder = self.model.model
        hidden = decoder.embed_tokens(self.ids)[:, 0]
        cos, sin = decoder.rotary_emb(hidden, torch.full((1, 1), self.length - 1, device=hidden.device))
        # The rotation by halves, of queries and keys in one: x cos + (the other half of x) sin, whose sign is put here.
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for layer, (k, v) in zip(self.layers, self.keys_and_values, strict=True):
            rows, g, _, d = k.shape
            x = norm(hidden, layer.layer.input_layernorm)
            heads = operations_for(x).project(x, layer.inputs.weight, layer.inputs.bias).view(rows, -1, d)
            rotated = torch.addcmul(heads[:, :-g] * cos, heads[:, :-g].roll(half, dims=-1), sin)
            k[:, :, -1], v[:, :, -1] = rotated[:, -g:], heads[:, -g:]
            q = rotated[:, :-g]
            q = q.unsqueeze(2) if self.backend == SDPBackend.CUDNN_ATTENTION else q.unflatten(1, (g, -1))
            with sdpa_kernel(self.backend):
                out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != g)
            hidden = layer.behind_attention(hidden, out.reshape(rows, -1))
        return self.model.lm_head(norm(hidden, decoder.norm)).unsqueeze(1)
