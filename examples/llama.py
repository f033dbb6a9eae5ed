"""A dense Llama checkpoint opened as an NSA model: its weights stay; phi starts as the mean, gates at one half."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM

sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)  # stands for your checkpoint
    config = NSALlamaConfig(attention="nsa", nsa={"window_size": 64}, **sizes, **heads)
    model = NSALlamaForCausalLM.from_pretrained(folder, config=config).eval()

prompt = torch.randint(3, 256, (1, 300))
print(
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0, 300:].tolist()
)
