"""What a model takes and reads when it decodes, counted from its configuration: nothing is run or loaded."""

from dataclasses import dataclass

import torch

from nsa.backend import PARTS_BYTES, SMALL_GROUP
from nsa.cache import StaticNSACache
from nsa.methods.registry import TRAINED
from nsa.models.configuration import SPARSE, NSALlamaConfig
from nsa.models.modeling import NSALlamaForCausalLM

# Token ids, masks and positions of the prompt, as generate() holds and reorders them: eight int64 a token.
PROMPT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes and counts of one model at one context and batch; one of NSA, one of its dense twin."""

    parameters: int
    weight_bytes: int
    cache_bytes: dict[str, int]  # by part, all layers and rows
    cache_bytes_per_token: float  # what one more token of one row adds
    keys_per_query: int  # mean over layers
    prefill_bytes: int  # the worst moment of a chunk, on top of weights and cache
    packed_bytes: int  # a layer's weights on their way to lie side by side, for captured steps (nsa.models.step)
    step_bytes: int  # read by a decoding step of the whole batch

    @property
    def total_bytes(self) -> int:
        """At the worst moment: the prefill and the captured step do not meet."""
        return self.weight_bytes + sum(self.cache_bytes.values()) + max(self.prefill_bytes, self.packed_bytes)

    def step_seconds(self, bandwidth: float) -> float:
        """A floor: the bytes of a step at `bandwidth` bytes a second."""
        return self.step_bytes / bandwidth


def plan(config: NSALlamaConfig, *, context: int, batch: int, chunk: int, dtype: torch.dtype) -> dict[str, Plan]:
    """The plans of "NSA" (or "InfLLM-V2", where the configuration is that) and of its "dense" twin.

    Args:
        config: of the model; its `attention` does not matter.
        context: tokens of each row, those to be generated included.
        batch: rows.
        chunk: tokens of a row that are prefilled at once.
        dtype: of weights and cache.

    The cache of NSA is the static one, counted from the tensors that it would allocate; dense keeps a key and a value
    of every token. A step reads all weights once (of an embedding table that is not tied, one row a token), and for
    every row and KV head the keys and values that its query sees. The prefill's activations are those of one layer at
    its worst moment, either in the attention or in the MLP, and the logits of the last token. Layers that stay dense
    beside sparse ones have dense's cache; no step of such a model is captured.

    Raises:
        ValueError: counts that are not positive.
    """
    if min(context, batch, chunk) < 1:
        raise ValueError(f"plan: expected positive counts, got context={context}, batch={batch}, chunk={chunk}")
    size, columns = dtype.itemsize, batch * min(chunk, context)
    layers, g, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    pair = 2 * g * width * size  # a key and a value of one layer
    plans = {}
    for attention in (config.attention if config.attention in SPARSE else "nsa", "dense"):
        method = TRAINED[attention]
        parameters, streamed = _parameters(config, attention)
        read = method.reads(method.sizes_of(config)).last(context)
        kept = len(config.dense_layers or ()) if method.is_sparse else layers
        sparse = layers - kept
        cache = _static_cache_bytes(config, sparse, context, batch, dtype) if sparse else {}
        window = cache.get("window", 0)
        if kept:
            cache["dense layers: all keys and values" if sparse else "keys and values"] = pair * kept * context * batch
        pairs = sparse * (read.attended + read.scored / 2) + kept * context  # those only scored have no values
        plans[method.label] = Plan(
            parameters=parameters,
            weight_bytes=parameters * size,
            cache_bytes=cache,
            cache_bytes_per_token=pair * (kept + sparse * (1 + 1 / config.nsa_config.compress_stride)),
            keys_per_query=round((sparse * read.keys + kept * context) / layers),
            prefill_bytes=_prefill_bytes(config, attention, columns, size)
            + (pair * context * batch if method.is_sparse else 0)  # a layer's keys, side by side
            + batch * (config.vocab_size * size + context * PROMPT_BYTES)
            + window,  # what a chunk overwrites, kept until it is through
            packed_bytes=_packed_parameters(config) * size if attention == "nsa" and not kept else 0,
            step_bytes=round(streamed * size + pair * pairs * batch),
        )
    return plans


def _parameters(config: NSALlamaConfig, attention: str) -> tuple[int, int]:
    """All, and those that a decoding step reads."""
    kept = config.dense_layers if TRAINED[attention].is_sparse else None
    values = {**config.to_dict(), "attention": attention, "dense_layers": kept}
    try:
        with torch.device("meta"):
            model = NSALlamaForCausalLM(NSALlamaConfig(**values))
    except (KeyError, TypeError, AttributeError) as error:  # transformers', for values that it knows nothing of
        raise ValueError(f"plan: the configuration makes no model: {type(error).__name__}: {error}") from error
    total = sum(parameter.numel() for parameter in model.parameters())
    table = model.model.embed_tokens.weight
    tied = model.lm_head.weight is table
    return total, total if tied else total - table.numel()


def _static_cache_bytes(
    config: NSALlamaConfig, layers: int, context: int, batch: int, dtype: torch.dtype
) -> dict[str, int]:
    cache = StaticNSACache(config.nsa_config, context)
    width = config.head_dim
    cache.allocate(batch, config.num_key_value_heads, width, width, dtype, torch.device("meta"))
    t = cache.tensors
    parts = {
        "selection: all keys and values": (t.k, t.v),
        "compression: a pair for every block": (t.k_cmp, t.v_cmp),
        "window": (t.k_win, t.v_win),
        "compression: raw, not yet complete": (t.k_raw, t.v_raw),
    }
    return {
        name: layers * sum(x.numel() * x.element_size() for x in pair if x is not None) for name, pair in parts.items()
    }


def _packed_parameters(config: NSALlamaConfig) -> int:
    """Of a layer's maps of one input, the copy that exists before the old ones go; and of all layers' biases."""
    branches = 1 if config.nsa_config.shared_kv else 3
    heads = config.num_attention_heads + branches * 2 * config.num_key_value_heads
    columns = heads * config.head_dim + 3 * config.num_attention_heads
    return columns * (config.hidden_size + config.num_hidden_layers)


def _prefill_bytes(config: NSALlamaConfig, attention: str, columns: int, size: int) -> int:
    """Activations of `columns` tokens at the worst moment of a layer."""
    h, g, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    branches = 1 if attention == "dense" or config.nsa_config.shared_kv else 3
    queries, pairs = h * width, branches * 2 * g * width
    # Embeddings, residual and its norm, rotary factors; then queries and their rotation (or the branches' outputs and
    # their sum) beside all keys and values, twice where they are rotated or gathered; or gate, up and their product.
    attention_part = columns * size * (5 * queries + 2 * pairs)
    if attention != "dense" and h // g <= SMALL_GROUP:
        # Of every selected block: an output, its greatest score and its sum, in fp32.
        parts = columns * config.nsa_config.num_selected_blocks * h * (width * size + 8)
        attention_part += min(parts, PARTS_BYTES)
    mlp_part = columns * size * 4 * config.intermediate_size
    return columns * size * (3 * config.hidden_size + 4 * width) + max(attention_part, mlp_part)
