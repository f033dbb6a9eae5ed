"""Hashes of outputs and gradients over a grid of cases on the CPU: what a change of structure must leave bit-identical.

    python tests/fingerprint.py > before.json                  # on the state before
    python tests/fingerprint.py --against before.json          # on the state after; says which cases differ

Numbers are those of one machine and one torch: compare two states, not two machines. Only what users and other layers
call is called here, so that what is inside may move.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "support"))
from decoding import DecodeCase, Scene, append_arguments
from layouts import LAYOUTS, Layout
from moved import moved

from nsa import NativeSparseAttention, NSACache, NSAConfig, native_sparse_attention
from nsa.cache import LayerCache, PagedNSACache, StaticNSACache
from nsa.decoding import append_tokens, decode_attention
from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.ops.causal_attention import causal_attention
from nsa.ops.combine import combine
from nsa.ops.compress import compress, phi_linear, phi_mean, phi_mlp
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.selected_attention import selected_attention
from nsa.ops.selection import block_scores, compressed_attention_and_selection, select_blocks
from nsa.ops.step import project, rms_norm
from nsa.ops.window_attention import window_attention

SMALL = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, num_local_blocks=2,
    window_size=10,
)  # fmt: skip
CONFIGS = {
    "small": SMALL,
    "no overlap": replace(SMALL, compress_block_size=4, select_block_size=16, num_selected_blocks=3, window_size=7),
    "all selected": replace(SMALL, num_selected_blocks=64, window_size=100),
}
DTYPES = {"fp64": torch.float64, "bf16": torch.bfloat16}
Case = tuple[str, Callable[[], Iterable[Any]]]


def fingerprint(results: Iterable[Any]) -> str:
    """Of dtypes, shapes and bits of tensors, in order; None and numbers count too."""
    digest = hashlib.sha256()
    for one in results:
        if isinstance(one, Tensor):
            one = one.detach().contiguous()
            digest.update(f"{one.dtype}{list(one.shape)}".encode())
            digest.update(one.reshape(-1).view(torch.uint8).numpy().tobytes() if one.numel() else b"")
        else:
            digest.update(repr(one).encode())
    return digest.hexdigest()[:16]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def with_gradients(outs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> list[Tensor | None]:
    """Outputs, and the gradients of their sum under weights that differ from number to number."""
    outs = (outs,) if isinstance(outs, Tensor) else outs
    float_outs = [x for x in outs if x is not None and x.requires_grad]
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype) for x in float_outs]
    leaves = [x for x in inputs if x.requires_grad]
    weights = [w.masked_fill(x == -torch.inf, 0.0) for x, w in zip(float_outs, weights, strict=True)]
    return [*outs, *torch.autograd.grad(float_outs, leaves, weights, allow_unused=True)]


def branches(layout: Layout, config: NSAConfig, dtype: torch.dtype, h: int = 4, g: int = 2) -> dict[str, Tensor]:
    b, t, s, d, e = layout.b, layout.t, layout.s, 8, 6
    c = layout.num_compressed_blocks(config)
    return {
        "q": normal(b, t, h, d, dtype=dtype), "k": normal(b, s, g, d, dtype=dtype),
        "v": normal(b, s, g, e, dtype=dtype), "gates": normal(b, t, h, 3, dtype=dtype),
        "k_cmp": normal(b, c, g, d, dtype=dtype), "v_cmp": normal(b, c, g, e, dtype=dtype),
        "k_win": normal(b, s, g, d, dtype=dtype), "v_win": normal(b, s, g, e, dtype=dtype),
    }  # fmt: skip


def phis(config: NSAConfig, d: int) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    flat, width = config.compress_block_size * d, 2 * d
    encoding = normal(config.compress_block_size, d)
    mlp = (encoding, normal(width, flat), normal(width), normal(d, width), normal(d))
    return {"mean": (phi_mean, ()), "linear": (phi_linear, (normal(d, flat),)), "mlp": (phi_mlp, mlp)}


# ---- one operation ------------------------------------------------------------------------------------------


def ops() -> Iterator[Case]:
    for (name, layout), (of, config), (dt, dtype) in product(LAYOUTS.items(), CONFIGS.items(), DTYPES.items()):

        def run(layout=layout, config=config, dtype=dtype) -> Iterator[Any]:
            x, where = branches(layout, config, dtype), layout.sequences()
            q, k, v, gates, k_cmp, v_cmp, k_win, v_win = x.values()
            pooled = {"num_keys": None if where.seqlens_k is not None else layout.s, "sequences": where}
            yield from with_gradients(compressed_attention(q, k_cmp, v_cmp, config, **pooled), q, k_cmp, v_cmp)
            out, lse, blocks = compressed_attention_and_selection(q, k_cmp, v_cmp, config, **pooled)
            yield from with_gradients((out, lse), q, k_cmp, v_cmp)
            yield from (blocks, select_blocks(q, k_cmp, config, **pooled), block_scores(q, k_cmp, config, **pooled))
            for tiling in ("by_query", "by_block", "masked", None):
                found = selected_attention(q, k, v, blocks, config, sequences=where, scale=0.3, tiling=tiling)
                yield from with_gradients(found, q, k, v)
            yield from with_gradients(window_attention(q, k_win, v_win, config.window_size, sequences=where), q, k_win)
            if where.is_uniform and layout.t == layout.s:
                yield from with_gradients(causal_attention(q, k, v), q, k, v)
            yield from with_gradients(combine(q, q * 2, q * 3, gates), gates, q)

        yield f"ops, {name}, {of}, {dt}", run
    for kind in ("mean", "linear", "mlp"):
        for name in ("whole", "packed", "left padded"):

            def run_phi(kind=kind, layout=LAYOUTS[name]) -> Iterator[Any]:
                x, (phi, weights) = normal(layout.b, layout.s, 2, 8), phis(SMALL, 8)[kind]
                compressed = compress(x, lambda y: phi(y, *weights), SMALL, sequences=layout.sequences())
                yield from with_gradients(compressed, x, *weights)

            yield f"compress, {kind}, {name}", run_phi

    def step() -> Iterator[Any]:
        x, weight, up, bias = normal(3, 8), normal(12, 8), normal(12, 8), normal(12)
        with torch.no_grad():
            yield project(x, weight, bias, sigmoid_from=5)
            yield project(x, weight, up=up)
            yield project(x, weight, add=normal(3, 12))
            yield rms_norm(x, normal(8), 1e-5)

    yield "step", step


# ---- the function -------------------------------------------------------------------------------------------


def function() -> Iterator[Case]:
    given = {"own": ("k_cmp", "v_cmp", "k_win", "v_win"), "defaults": (), "own window": ("k_win", "v_win")}
    for (name, layout), (of, config), (dt, dtype) in product(LAYOUTS.items(), CONFIGS.items(), DTYPES.items()):
        for kind, names in given.items():

            def run(layout=layout, config=config, dtype=dtype, names=names) -> Iterator[Any]:
                x = branches(layout, config, dtype)
                x = {key: value for key, value in x.items() if len(key) < 3 or key == "gates" or key in names}
                out = native_sparse_attention(**x, config=config, **layout.lengths())
                yield from with_gradients(out, *x.values())

            yield f"function, {name}, {of}, {dt}, {kind}", run

    def autocast() -> Iterator[Any]:
        x = branches(LAYOUTS["whole"], SMALL, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            yield from with_gradients(native_sparse_attention(**x, config=SMALL, scale=0.2), *x.values())

    yield "function, autocast", autocast

    def window_of_its_own() -> Iterator[Any]:
        x = branches(LAYOUTS["decode"], SMALL, torch.float64)
        x["k_win"], x["v_win"] = x["k_win"][:, -20:], x["v_win"][:, -20:]
        yield from with_gradients(native_sparse_attention(**x, config=SMALL), *x.values())
        lengths = {"seqlens_k": torch.tensor([45, 30]), "seqlens_win": torch.tensor([20, 11])}
        yield from with_gradients(native_sparse_attention(**x, config=SMALL, **lengths), *x.values())

    yield "function, a window of its own length", window_of_its_own

    def traced() -> Iterator[Any]:
        x = branches(LAYOUTS["whole"], SMALL, torch.float64)
        compiled = torch.compile(native_sparse_attention, backend="eager", fullgraph=True)
        yield from with_gradients(compiled(**x, config=SMALL), *x.values())

    yield "function, compiled", traced


# ---- the layer and its caches ----------------------------------------------------------------------------------


def layer(config: NSAConfig, dtype: torch.dtype = torch.float64) -> NativeSparseAttention:
    made = NativeSparseAttention(24, 4, 2, head_dim=6, v_head_dim=4, config=config, bias=True)
    moved(made, 0.2)
    return made.to(dtype)


LAYERS = {
    f"{compression}{' shared' if shared else ''}": replace(SMALL, compression=compression, shared_kv=shared)
    for compression, shared in product(("mlp", "linear", "mean"), (False, True))
}


def layers() -> Iterator[Case]:
    mask = torch.tensor([[0] * 7 + [1] * 23, [1] * 30, [1] * 20 + [0] * 10])
    calls: dict[str, dict[str, Any]] = {
        "plain": {}, "mask": {"attention_mask": mask},
        "packed": {"cu_seqlens": torch.tensor([0, 13, 13, 40, 90]), "max_seqlen": 50},
        "positions": {"position_ids": torch.arange(5, 35)[None]},
    }  # fmt: skip
    for (name, config), (how, kwargs) in product(LAYERS.items(), calls.items()):

        def run(config=config, kwargs=kwargs) -> Iterator[Any]:
            made, x = layer(config), normal(3, 30, 24)
            yield from with_gradients(made(x, **kwargs), x, *made.parameters())
            yield from made.select(x)

        yield f"layer, {name}, {how}", run

    def starts() -> Iterator[Any]:
        for config in LAYERS.values():
            yield from NativeSparseAttention(24, 4, 2, config=config).parameters()

    yield "layer, first weights", starts


CACHES: dict[str, Callable[[NSAConfig], LayerCache]] = {
    "growing": NSACache,
    "static": lambda config: StaticNSACache(config, 64, max_crop=3, max_new=4),
    "paged": lambda config: PagedNSACache(config, 16, page_size=16, max_crop=3, max_new=4),
}


@torch.no_grad()
def life(made: NativeSparseAttention, cache: LayerCache) -> Iterator[Any]:
    """Chunks, padding, single tokens, a crop, beams, and what is remembered in the end."""
    dtype = made.q_proj.weight.dtype
    for t in (21, 9, 1, 1, 3):
        yield made(normal(2, t, 24).to(dtype), cache=cache)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    yield made(normal(2, 6, 24).to(dtype), cache=cache, attention_mask=mask)
    yield made(normal(2, 1, 24).to(dtype), cache=cache, attention_mask=torch.tensor([[0], [1]]))
    cache.crop(2)
    yield made(normal(2, 2, 24).to(dtype), cache=cache)
    cache.reorder(torch.tensor([1, 1, 0]))
    yield made(normal(3, 1, 24).to(dtype), cache=cache)
    yield cache.lengths, cache.num_bytes()


def caches() -> Iterator[Case]:
    for (name, config), (kind, new) in product(LAYERS.items(), CACHES.items()):
        yield f"cache, {kind}, {name}", lambda config=config, new=new: life(layer(config), new(config))
    for kind, new in CACHES.items():
        yield f"cache, {kind}, bf16", lambda new=new: life(layer(SMALL, torch.bfloat16), new(SMALL))

    def growing_with_gradients() -> Iterator[Any]:
        made, x, cache = layer(SMALL), normal(2, 30, 24), NSACache(SMALL)
        outs = [made(part, cache=cache) for part in x.split((20, 9, 1), 1)]
        yield from with_gradients(torch.cat(outs, 1), x, *made.parameters())

    yield "cache, growing, gradients", growing_with_gradients
    for compression, page_size in product(("mlp", "linear", "mean"), (None, 16)):
        case = DecodeCase(
            lengths=(37, 50, 5), t=3, config=replace(SMALL, compression=compression), dtype=torch.float64,
            page_size=page_size,
        )  # fmt: skip

        def run(case=case) -> Iterator[Any]:
            scene, before = Scene(case), (34, 48, 4)
            tensors = scene.cache(before)
            append_tokens(tensors, **append_arguments(scene.new_tokens(before, 3, (3, 2, 1), True)))
            yield from (x for x in vars(tensors).values() if x is not None)
            yield decode_attention(scene.q, scene.gates, tensors, case.config, counts=torch.tensor([3, 2, 1]))

        yield f"decoding, {compression}, {page_size}", run


# ---- models -----------------------------------------------------------------------------------------------------


def model(attention: str, **kwargs: Any) -> NSALlamaForCausalLM:
    sizes = {"window_size": 10, "compress_block_size": 8, "compress_stride": 4, "select_block_size": 8}
    made = NSALlamaForCausalLM(
        NSALlamaConfig(
            attention=attention, nsa={**sizes, "num_selected_blocks": 4}, vocab_size=48, hidden_size=24,
            intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
            max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0, **kwargs,
        )
    )  # fmt: skip
    return made.eval().double()


def models() -> Iterator[Case]:
    for attention in ("nsa", "dense", "window"):

        def run(attention=attention) -> Iterator[Any]:
            made = model(attention)
            yield from made.parameters()
            ids = torch.randint(2, 48, (2, 33))
            mask = torch.ones_like(ids)
            mask[0, :9] = 0
            positions = torch.cat([torch.arange(13), torch.arange(20)])[None].expand(2, -1)
            for kwargs in ({}, {"attention_mask": mask}, {"position_ids": positions, "use_cache": False}):
                out = made(input_ids=ids, labels=ids, **kwargs)
                yield from with_gradients((out.loss, out.logits), *made.parameters())
            yield made.train()(input_ids=ids, labels=ids).loss

        yield f"model, {attention}", run

        def generate(attention=attention) -> Iterator[Any]:
            made = model(attention)
            ids = torch.randint(2, 48, (2, 21))
            mask = torch.ones_like(ids)
            mask[0, :9] = 0
            asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
            for kwargs in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}):
                yield made.generate(ids, **asked, **kwargs)
            found = made.generate(ids, **asked, output_scores=True, return_dict_in_generate=True)
            yield from found.scores
            yield made.decode_path

        yield f"generate, {attention}", generate

    def steps(layout: str) -> Iterator[Any]:
        made = model("nsa")
        room: dict[str, Any] = {"static": {"max_length": 64}, "paged": {"num_pages": 12, "page_size": 16}}[layout]
        cache = NSALlamaCache(made.config, layout=layout, **room)  # type: ignore[arg-type]
        ids = torch.randint(2, 48, (2, 40))
        with torch.no_grad():
            for part in ids.split((30, 1, 1, 4, 4), 1):
                yield made(input_ids=part, past_key_values=cache).logits
            cache.crop(-2)
            yield made(input_ids=ids[:, 38:39], past_key_values=cache, output_hidden_states=True).hidden_states[-1]

    for layout in ("static", "paged"):
        yield f"model, steps, {layout}", lambda layout=layout: steps(layout)


def cases() -> Iterator[Case]:
    for family in (ops, function, layers, caches, models):
        yield from family()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="what this wrote on another state")
    parser.add_argument("--only", default="", help="only cases whose names begin with this")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    for name, run in cases():
        if name.startswith(asked.only):
            torch.manual_seed(0)
            found[name] = fingerprint(run())
    if asked.against is None:
        print(json.dumps(found, indent=1))
        return
    expected = {name: one for name, one in json.loads(asked.against.read_text()).items() if name.startswith(asked.only)}
    differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    print(f"{len(found)} cases, {len(differ)} differ", *differ, sep="\n  ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
