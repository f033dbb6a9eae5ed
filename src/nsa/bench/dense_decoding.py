"""The dense twin at its best: a decoding step as a CUDA graph over exactly the keys that there are."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nsa.models import NSALlamaForCausalLM

BACKENDS = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


class DenseDecoder:
    """Steps of one token a row at position length - 1, over random keys and values before it.

    A captured graph knows one length; the step is repeated at that length. Dense attention over a longer buffer under a
    mask, as a graph for every length would need it, takes longer. Each backend gets the heads in the form in which it
    is faster, every key read once: cuDNN by enable_gqa, FlashAttention-2 with a group as the queries of its KV head.
    """

    def __init__(
        self, model: NSALlamaForCausalLM, batch: int, length: int, backend: SDPBackend, *, capture: bool = True
    ) -> None:
        self.model, self.length, self.backend = model, length, backend
        config = model.config
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys_and_values = torch.empty(shape, dtype=model.dtype, device=model.device).normal_()
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
        decoder, rows = self.model.model, len(self.ids)
        hidden = decoder.embed_tokens(self.ids)
        position = torch.full((1, 1), self.length - 1, device=hidden.device)
        cos, sin = decoder.rotary_emb(hidden, position)
        for layer, (k, v) in zip(decoder.layers, self.keys_and_values, strict=True):
            x, attention = layer.input_layernorm(hidden), layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k_new, v_new = (p(x).view(rows, 1, -1, attention.head_dim).transpose(1, 2) for p in projections)
            q, k_new = apply_rotary_pos_emb(q, k_new, cos, sin)
            k[:, :, -1:], v[:, :, -1:] = k_new, v_new
            if self.backend != SDPBackend.CUDNN_ATTENTION:
                q = q.reshape(rows, k.shape[1], -1, attention.head_dim)
            with sdpa_kernel(self.backend):
                out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
            hidden = hidden + attention.o_proj(out.reshape(rows, 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden))
