"""The arguments of `nsa bench`; without torch, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from nsa.bench.options import HeadDim, Heads, HiddenSize, Json, KeyDim, KVHeads, Output, Repetitions, ValueDim
from nsa.bench.train_arguments import TrainArguments

RIVALS = ("cuDNN", "FlashAttention-2", "FlexAttention", "FlexAttention, selected branch")


class ValueWidth:
    """What is one where values may be narrower than keys."""

    head_dim: int
    value_dim: int | None

    @property
    def e(self) -> int:
        """Width of a head of v."""
        return self.head_dim if self.value_dim is None else self.value_dim


@dataclass(frozen=True)
class KernelArguments(ValueWidth):
    """The attention function and each of its kernels, beside torch's dense attention, in one interleaved run.

    NSA: q, gates and the keys and values of the three branches in, output out; and its backward. Dense: causal, of the
    same q, k, v, by cuDNN, FlashAttention-2 and FlexAttention; and FlexAttention over NSA's selected blocks, one branch
    of three. Random inputs, and random ones whose queries resemble their neighbours. U4 is the number of distinct
    blocks that four neighbouring queries select between them.

    Examples:
        nsa bench kernels
        nsa bench kernels --lengths 8192 65536 --output kernels_h200
        nsa bench kernels --lengths 65536 --rivals
        nsa bench kernels --heads 32 --kv-heads 2 --head-dim 64 --rivals cuDNN --json
        nsa bench kernels --head-dim 192 --value-dim 128
    """

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    """Lengths in tokens."""
    heads: Heads = 64
    kv_heads: KVHeads = 4
    head_dim: KeyDim = 128
    value_dim: ValueDim = None
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Number format of the inputs."""
    rivals: tuple[str, ...] = RIVALS
    """Whom to compare with: cuDNN, FlashAttention-2, FlexAttention, "FlexAttention, selected branch"; or nobody."""
    repetitions: Repetitions = 5
    output: Output = None
    json: Json = False

    def wants(self, rival: str) -> bool:
        return rival in self.rivals


@dataclass(frozen=True)
class ModuleArguments:
    """One layer, hidden states to hidden states, beside its dense twin: forward, and forward with backward, in bf16.

    Also what phi, the compression of keys and values (plain PyTorch), takes of it.

    Examples:
        nsa bench module
        nsa bench module --lengths 65536 --hidden-size 2560 --output module_h200
    """

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    """Lengths in tokens."""
    hidden_size: HiddenSize = 4096
    heads: Heads = 64
    kv_heads: KVHeads = 4
    head_dim: HeadDim = 128
    repetitions: Repetitions = 5
    output: Output = None
    json: Json = False


@dataclass(frozen=True)
class StepArguments:
    """A training step of a whole language model beside its dense twin: forward, backward, AdamW, one row of tokens.

    Weights in fp32, bf16 autocast, gradient checkpointing; both models are in memory at once.

    Examples:
        nsa bench step
        nsa bench step --lengths 32768 --repetitions 2 --output step_h200
        nsa bench step --preset small --lengths 4096
    """

    lengths: tuple[int, ...] = (32768, 65536)
    """Tokens in the row."""
    preset: str = "1b"
    """Whose sizes: demo, small or 1b."""
    layers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Layers of the model. Default: the preset's."""
    repetitions: Repetitions = 3
    output: Output = None
    json: Json = False


@dataclass(frozen=True)
class GenerateArguments:
    """A language model that decodes, beside its dense twin: random weights in bf16, by default in Llama 3.2 1B's sizes.

    decoding step: of the whole batch over caches filled with random numbers; NSA as generate() runs it (a CUDA graph)
    and without the graph; the dense twin as a CUDA graph over exactly its keys, by FlashAttention-2 and by cuDNN, with
    the same products around it; and as transformers runs it, with a cache that grows and with a static one, neither
    compiled. generate(): both models' own, from prompt to last token, milliseconds between tokens (the median); the
    dense twin with the cache that grows. first token: a prompt of one row, NSA in chunks.

    Examples:
        nsa bench generate
        nsa bench generate --lengths 8192 65536 --batches 1 8 --output generate_h200
        nsa bench generate --layers 20 --heads 32 --kv-heads 2 --intermediate-size 5632 --vocab-size 32768
        nsa bench generate --lengths --generate-at --prompts 1048576 --dense-prompt 0
    """

    lengths: tuple[int, ...] = (8192, 32768, 65536, 131072)
    """Tokens before a decoding step."""
    batches: tuple[int, ...] = (1, 8)
    """Rows."""
    generate_at: tuple[int, ...] = (65536,)
    """Lengths at which generate() runs from the prompt on, with the largest batch; none to leave it out."""
    new_tokens: int = 64
    """Tokens that generate() makes, four or more: the first three are not among those that are timed."""
    prompts: tuple[int, ...] = (8192, 65536, 131072)
    """Lengths of prompts of which the first token is timed; none to leave it out."""
    dense_prompt: int = 131072
    """The dense twin reads prompts up to this length."""
    prefill_chunk: int = 16384
    """Tokens of a row that NSA reads at once."""
    layers: int = 16
    """Layers of the model."""
    hidden_size: HiddenSize = 2048
    heads: Heads = 32
    kv_heads: KVHeads = 8
    head_dim: HeadDim = 64
    intermediate_size: int = 8192
    """Width inside the MLP."""
    vocab_size: int = 128256
    """Tokens that there are; input and output embeddings are one."""
    repetitions: Repetitions = 5
    output: Output = None
    json: Json = False


@dataclass(frozen=True)
class DecodeArguments(ValueWidth):
    """One layer's attention for one new token a row, as steps of a CUDA graph, beside dense attention.

    NSA: its two launches over a cache of one page a row, and over shuffled pages of 256 tokens; and with the append
    (one more launch, of which every 16th completes a block), also over block tables as a serving engine has them, whose
    time as a multiple of the static cache's is printed. Dense: the same query over the same raw keys, by cuDNN and
    FlashAttention-2, KV heads shared; who does not take the widths is left out with a line. The steps of a graph go
    round several caches, so that keys come from memory; where one step's keys fit in the L2, also one cache again and
    again. The floor is the bytes of keys and values over the bandwidth of a copy, measured in the same run.

    Examples:
        nsa bench decode
        nsa bench decode --lengths 8192 65536 --batches 1 32 --output decode_h200
        nsa bench decode --lengths 65536 --batches 1 --rivals cuDNN --json
        nsa bench decode --head-dim 192 --value-dim 128
    """

    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
    """Tokens in the cache."""
    batches: tuple[int, ...] = (1, 8, 32, 64)
    """Rows."""
    heads: Heads = 64
    kv_heads: KVHeads = 4
    head_dim: KeyDim = 128
    value_dim: ValueDim = None
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Number format of the cache."""
    rivals: tuple[str, ...] = RIVALS[:2]
    """Whom to compare with: cuDNN, FlashAttention-2; or nobody."""
    repetitions: Repetitions = 5
    output: Output = None
    json: Json = False


@dataclass(frozen=True)
class ShowArguments:
    """A result again: the tables of a STEM.json, and STEM.md and STEM.svg from it.

    Examples:
        nsa bench show kernels_h200.json
        nsa bench show kernels_h200.json --output kernels_h200
    """

    result: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RESULT.json")]
    """What `nsa bench ... --output` wrote."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="STEM")] = None
    """Write STEM.md and STEM.svg."""


Measured: TypeAlias = (
    KernelArguments | ModuleArguments | StepArguments | TrainArguments | DecodeArguments | GenerateArguments
)
