"""What vLLM captures of a decoding step: tables in storage that stays, and nothing that the host would have to read."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm_models import engine, expected, greedy, prompts, written

from nsa.config import NSAConfig
from nsa.serving import vllm_cache
from nsa.serving.vllm_cache import FixedTables, Tables, TablesBuilder, decode_step_of

SPEC = {"block_size": 256, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
MAIN = FullAttentionSpec(**SPEC)
READS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")


class NoReads(TorchDispatchMode):
    """Fails where a device would have to tell the host a value, or how large a result is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in READS, f"{function} reads a value"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def config(monkeypatch):
    """Of an engine for a model of four heads, where the kernels serve: as on a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda parallel: 4, get_num_kv_heads=lambda parallel: 2, get_head_size=lambda: 32,
            dtype=torch.bfloat16, hf_config=SimpleNamespace(attention="nsa", dense_layers=None),
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=6), speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )  # fmt: skip


def batch(lengths, counts, table, tokens=None):
    """As vLLM's runner makes it; rows of no tokens are padding."""
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=seq_lens, num_reqs=len(lengths),
        num_actual_tokens=tokens or sum(counts), max_query_len=max(counts), max_seq_len=max(lengths),
        block_table_tensor=torch.tensor(table, dtype=torch.int32), slot_mapping=torch.zeros(0, dtype=torch.long),
        seq_lens_cpu_upper_bound=seq_lens,
    )  # fmt: skip


def builder(config, spec=MAIN):
    return TablesBuilder(spec, ["a.attn", "b.attn"], config, torch.device("cpu"))


def test_decoding_is_captured_whole_where_the_kernels_serve(config, monkeypatch):
    assert TablesBuilder.get_cudagraph_support(config, MAIN) is AttentionCGSupport.UNIFORM_BATCH
    config.model_config.hf_config.attention = "infllm_v2"
    assert TablesBuilder.get_cudagraph_support(config, MAIN) is AttentionCGSupport.NEVER
    config.model_config.hf_config.attention = "nsa"
    config.model_config.dtype = torch.float64
    assert TablesBuilder.get_cudagraph_support(config, MAIN) is AttentionCGSupport.NEVER
    config.model_config.dtype = torch.bfloat16
    config.speculative_config = SimpleNamespace(num_speculative_tokens=16, parallel_drafting=False)
    assert TablesBuilder.get_cudagraph_support(config, MAIN) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    monkeypatch.delenv("TRITON_INTERPRET")
    assert TablesBuilder.get_cudagraph_support(config, MAIN) is AttentionCGSupport.NEVER  # no GPU here


def test_what_a_graph_was_captured_with_is_what_later_steps_fill(config):
    build = builder(config)
    captured = build.build_for_cudagraph_capture(batch([1, 1, 1, 1], [1, 1, 1, 1], [[0, 0, 0]] * 4))
    assert isinstance(captured, FixedTables)
    assert captured.lengths.tolist() == captured.counts.tolist() == [0] * 4  # no row has a block yet
    given = batch([300, 7, 0, 0], [1, 1, 0, 0], [[5, 9, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]], 4)
    with NoReads():
        found = build.build(0, given)
    for name in ("table", "lengths", "counts", "arrivals"):
        one, other = getattr(captured, name), getattr(found, name)
        assert one.data_ptr() == other.data_ptr(), name
        assert one.shape == other.shape
    assert captured.table.tolist() == [[5, 9, -1], [3, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert captured.lengths.tolist() == [300, 7, 0, 0]
    assert captured.counts.tolist() == [1, 1, 0, 0]


def test_drafts_are_decoding_too_and_chunks_are_not(config):
    build = builder(config)
    assert build.build(0, batch([300, 7], [5, 5], [[5, 9], [3, 0]])).t == 5
    for counts in ([1, 17], [17, 17], [5, 3]):
        assert isinstance(build.build(0, batch([300, 70], counts, [[5, 9], [3, 0]])), Tables)


def test_layers_share_a_step_that_is_made_anew_in_every_pass(config):
    window = SlidingWindowSpec(**SPEC, sliding_window=64)
    given = batch([300, 7], [1, 1], [[5, 9], [3, 0]])
    main, win, raw = (builder(config, spec).build(0, given) for spec in (MAIN, window, window))
    made = []

    def rotary(like, positions):
        made.append(positions)
        return (like.new_zeros(*positions.shape, 32),) * 2

    like = torch.zeros(2, 4, 32)
    with NoReads():
        for passes in (1, 2):
            first, second = (decode_step_of(main, win, raw, NSAConfig(), rotary, like) for _ in range(2))
            assert len(made) == passes
            assert first[1] is second[1]
            assert first[2].data_ptr() != second[2].data_ptr()
    assert first[2].tolist() == [299, 6]
    assert made[0].tolist() == [[299, 272], [6, 0]]  # of the token, and of the block that would end with its stride
    assert first[0].table_win.data_ptr() == win.table.data_ptr()


def test_the_steps_that_graphs_hold_write_what_generate_writes(folders, monkeypatch):
    """In the engine, over its own tables; here with the operations that the kernels are compared with."""
    monkeypatch.setattr(vllm_cache, "why_not_kernels", lambda *_: None)
    steps, real = [], TablesBuilder._fixed
    monkeypatch.setattr(TablesBuilder, "_fixed", lambda *given: steps.append(given[2]) or real(*given))
    options = {"max_num_batched_tokens": 200, "max_num_seqs": 8, "max_model_len": 1024, "num_gpu_blocks_override": 16}
    given = prompts(1, 31, 250, 245, 500, 252, seed=15)
    llm = engine(folders["nsa"], **options)
    assert written(greedy(llm, given, 12)) == expected(folders["nsa"], given, 12)
    assert len(set(steps)) > 1  # rows: alone, and several
