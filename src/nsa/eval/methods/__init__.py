"""Attention methods that can be laid over a trained model: a method is a file, and a row here.

budget.py      the common budget: first, last and chosen keys
method.py      the interface, one sequence in one layer, counts of keys read
attention.py   what they share: scores, softmax, dense attention, moving rotary positions
cache.py       batches and padding; transformers' registration
phased.py      a model with a method: prefill, then decode, measured
"""

from nsa.eval.methods.budget import Split, split
from nsa.eval.methods.cache import MethodCache, attached
from nsa.eval.methods.clusterkv import ClusterKV
from nsa.eval.methods.exact_top import ExactTop
from nsa.eval.methods.full import Full
from nsa.eval.methods.h2o import H2O
from nsa.eval.methods.infllm import InfLLM
from nsa.eval.methods.magicpig import MagicPIG
from nsa.eval.methods.method import Method
from nsa.eval.methods.minference import MInference
from nsa.eval.methods.nsa import NSA, InfLLMv2
from nsa.eval.methods.quest import Quest
from nsa.eval.methods.streaming_llm import StreamingLLM

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (NSA, InfLLMv2, Full, ExactTop, StreamingLLM, H2O, InfLLM, Quest, MInference, ClusterKV, MagicPIG)
}

__all__ = ["METHODS", "Method", "MethodCache", "Split", "attached", "split"]
