"""`nsa bench scale` on CPUs: it runs, and counts the bytes that a layer's ranks really receive."""

from contextlib import ExitStack
from unittest import mock

import torch
import torch.distributed as dist
from groups import sizes

from nsa import NativeSparseAttention, NSAConfig
from nsa.bench import scale
from nsa.bench.result import Result
from nsa.bench.scale_arguments import ScaleArguments
from nsa.bench.scale_on_paper import bytes_of_a_layer
from nsa.distributed import context_parallel

SIZES = {"hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 8}
NSA = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=10,
)  # fmt: skip


@sizes(2)
def case_measures():
    arguments = ScaleArguments(
        lengths=(64,), **SIZES, preset="demo", row=64, rows=(1, 2), longest=64, repetitions=1, compile=False
    )
    with mock.patch.object(scale, "LINK", 4096):
        entries = list(scale.measure(arguments, "cpu"))
    result = Result(bench="scale", facts={}, shape={}, matrix_rate=1.0, entries=entries)
    (table,) = scale.tables(Result.from_json(result.to_json()))
    by = {(row[0], row[2]) for row in table.rows}
    several = ["2 GPUs, FSDP2", "2 GPUs, FSDP2, gathered once"] + ["one GPU"] * (dist.get_rank() == 0)
    assert by >= {(f"step of demo, {rows} rows a GPU", name) for rows in (1, 2) for name in several}
    assert by >= {("the connection", "all-gather"), ("layer, forward + backward", "exchanges alone")}
    assert ("one row through demo", "2 GPUs, FSDP2 and context parallelism") in by


@sizes(2, 3)
def case_counts_the_bytes_of_a_layer():
    ranks = dist.get_world_size()
    length = 2 * 24 * ranks
    layer = NativeSparseAttention(32, 4, 2, 8, config=NSA).bfloat16()
    part = context_parallel(layer, dist.group.WORLD).zigzag.shard(torch.randn(1, length, 32)).bfloat16()
    for bounds in (None, torch.tensor([0, 50, length], dtype=torch.int32)):
        forward, backward = received_by(lambda bounds=bounds: layer(part.requires_grad_(), cu_seqlens=bounds))
        if dist.get_rank() > 0:  # nobody sends the first tokens of all what came before
            assert (forward, backward) == bytes_of_a_layer(length, ranks, 2 * 8, NSA)


def received_by(run):
    """Bytes that torch.distributed gives this rank in forward and in backward."""
    received = []

    def counted(function, elements):
        def call(out, x, *args, **kwargs):
            received.append(elements(out, x) * out.element_size())
            return function(out, x, *args, **kwargs)

        return call

    with ExitStack() as patches:
        for name, elements in (
            ("all_gather_into_tensor", lambda out, x: out.numel() - x.numel()),
            ("reduce_scatter_tensor", lambda out, x: x.numel() - out.numel()),
            ("all_to_all_single", lambda out, x: out.numel()),
        ):
            patches.enter_context(mock.patch.object(dist, name, counted(getattr(dist, name), elements)))
        out = run()
        forward = sum(received)
        out.sum().backward()
    return forward, sum(received) - forward
