"""`nsa bench decode` with values narrower than keys: what it makes, what it counts, what its result says. No GPU."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from nsa.bench import decode, timing
from nsa.bench.arguments import DecodeArguments
from nsa.bench.result import Entry
from nsa.cli import main
from nsa.config import NSAConfig
from nsa.decoding import decode_attention
from nsa.testing import brute_force
from nsa.testing.comparison import assert_close_to_fp64

# 127 tokens: every query reads all blocks of keys, and the next token completes a compressed block.
SMALL = DecodeArguments(lengths=(127,), batches=(3,), heads=4, kv_heads=2, head_dim=24, value_dim=16)
SIZES = (NSAConfig(), 127, 3, "cpu")


def test_where_all_blocks_are_read_the_selected_branch_and_the_dense_rival_are_dense_attention(monkeypatch):
    layer = decode._Layer(SMALL, *SIZES)
    monkeypatch.setattr(decode, "decode_attention", lambda *given, backend: decode_attention(*given))
    layer.gates = torch.tensor([0.0, 1.0, 0.0], dtype=layer.q.dtype).expand_as(layer.gates)
    sparse, dense = layer.attend()[:, 0], layer.dense(SDPBackend.MATH)()[:, :, 0]
    k, v = (x[:, :127].double() for x in (layer.tensors.k, layer.tensors.v))
    rows = zip(layer.q.double(), k, v, strict=True)
    exact = torch.cat([brute_force.dense_attention(*row)[0] for row in rows])
    assert exact.shape == (3, 4, 16)
    assert_close_to_fp64(sparse, dense, exact)
    assert_close_to_fp64(dense, sparse, exact)


@pytest.mark.parametrize("pages", [None, decode.PAGE])
def test_a_step_appends_and_attends_over_its_cache(pages, monkeypatch):
    layer = decode._Layer(SMALL, *SIZES, page=pages)
    for name in ("append_tokens", "decode_attention"):
        real = getattr(decode, name)
        monkeypatch.setattr(decode, name, lambda *given, backend, real=real, **more: real(*given, **more))
    assert layer.step().shape == (3, 1, 4, 16)
    assert layer.tensors.lengths.tolist() == [128] * 3
    assert {x.shape[3] for x in decode._memory(layer.tensors)} == {24, 16}


def test_a_step_over_block_tables_appends_and_attends_keys_beside_values():
    served = decode._Served(SMALL, *SIZES)
    assert served.step().shape == (3, 4, 16)
    assert served.tensors.lengths.tolist() == [128] * 3
    memory = served.memory
    assert memory.v.data_ptr() - memory.k.data_ptr() == 24 * memory.k.element_size()
    assert {x.stride(1) for x in vars(memory).values()} == {24 + 16}


@pytest.mark.parametrize(("value_dim", "width"), [(None, 192 + 192), (128, 192 + 128)])
def test_floors_and_room_are_those_of_both_widths(value_dim, width, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    arguments = DecodeArguments(head_dim=192, value_dim=value_dim)
    (entry,) = decode._cell(arguments, 8192, 2, 1e12, "cpu")
    # Two rows, 4 heads, 16 bits; 8k tokens: 511 compressed keys, 16 blocks of 64, a window of 512. In microseconds.
    token = 2 * 4 * width * 2
    assert entry.facts["floor"] == pytest.approx((511 + 1024 + 512) * token / 1e6)
    assert entry.facts["dense floor"] == pytest.approx(8192 * token / 1e6)
    assert entry.facts["needs GiB"] == pytest.approx((8192 + 512) * (1 + 1 / 16) * token / 2**30)


@pytest.mark.parametrize(("bench", "given", "width"), [("decode", ["--value-dim", "128"], 128), ("kernels", [], 192)])
def test_a_result_says_both_widths(bench, given, width, monkeypatch, capsys):
    entry = Entry(length=8, inputs="random", part="kernels", ms={})
    for name, value in (("require_cuda", None), ("device_facts", {}), ("matrix_rate", 1e12)):
        monkeypatch.setattr(timing, name, lambda value=value: value)
    monkeypatch.setattr(f"nsa.bench.{bench}.measure", lambda arguments: iter([entry]))
    command = ["bench", bench, "--head-dim", "192", *given]
    assert main([*command, "--json"]) == 0
    shape = json.loads(capsys.readouterr().out)["shape"]
    assert (shape["head_dim"], shape["value_dim"]) == (192, width)
    monkeypatch.setattr(f"nsa.bench.{bench}.measure", lambda arguments: iter([]))
    assert main(command) == 0
    assert f"head_dim=192, value_dim={width}, " in capsys.readouterr().out


def test_a_rival_that_does_not_take_the_widths_is_left_out_with_a_line_beside_the_result(monkeypatch, capsys):
    def captured(steps):
        if "dense" in steps[0].__qualname__:
            raise RuntimeError("No available kernel.\nMore of it.")
        return SimpleNamespace(replay=None)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e9, 1e9))
    monkeypatch.setattr(decode, "COLD_BYTES", 1)
    monkeypatch.setattr(decode, "_captured", captured)
    monkeypatch.setattr(decode, "interleaved", lambda runs, repetitions: dict.fromkeys(runs, 16.0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=0))
    attention, both = decode._cell(SMALL, 127, 3, 1e12, "cpu")
    assert attention.ms == {"NSA": 1.0, "NSA, pages": 1.0}
    assert both.ms == {"NSA": 1.0, "NSA, block tables": 1.0}
    out, said = capsys.readouterr()
    assert out == ""
    assert said.splitlines()[:2] == [
        f"nsa bench: {name} at 127 tokens, batch 3: No available kernel." for name in ("cuDNN", "FlashAttention-2")
    ]
