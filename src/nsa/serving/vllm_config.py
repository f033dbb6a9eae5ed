"""What an engine's options have to be for an NSA model, checked before anything is loaded."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from nsa.serving.checks import check_served
from nsa.serving.step import check_block_size
from nsa.serving.vllm_version import BLOCK_SIZE


class NSAModelConfig(VerifyAndUpdateConfig):
    """Called by vLLM with all its options, for our architectures."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """ValueError in one line where an option is set that these caches do not have."""
        model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
        config = model.hf_config
        if config.attention in ("dense", "window"):
            return  # the twins are vLLM's own Llama
        check_served(config.attention)
        if not cache.user_specified_block_size:
            # As if asked for: a platform would put its own in its place.
            cache.block_size, cache.user_specified_block_size = BLOCK_SIZE, True
        if config.attention == "nsa":
            check_block_size(cache.block_size, config.nsa_config)
        if cache.cache_dtype != "auto":
            raise ValueError(f"kv_cache_dtype: the caches have the model's, expected 'auto', got {cache.cache_dtype!r}")
        heads, ranks = config.num_key_value_heads, parallel.tensor_parallel_size
        if heads % ranks:
            raise ValueError(f"tensor_parallel_size: expected a divisor of num_key_value_heads={heads}, got {ranks}")
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            if (ranks := getattr(parallel, name, 1)) > 1:
                raise ValueError(f"{name}: NSA has no context parallelism here, expected 1, got {ranks}")
