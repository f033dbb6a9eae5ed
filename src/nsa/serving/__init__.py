"""Serving NSA models: what a serving engine needs of the attention, its plug-in for vLLM, and `nsa serve`.

* `step`, `blocks`, `append`, `attend`: a layer's step over block tables, in PyTorch; they need no engine.
* `vllm_plugin`: the model class, cache layers and metadata for vLLM.
* `command`: `nsa serve`.
"""
