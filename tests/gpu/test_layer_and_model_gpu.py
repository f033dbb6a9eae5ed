"""The layer and the model on a GPU: they take the kernels by themselves, and mean what they mean on the CPU."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from nsa import NativeSparseAttention, NSACache, NSAConfig
from nsa.backend import use_backend
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.testing import assert_close_to_fp64

pytestmark = pytest.mark.gpu

CONFIG = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=5, window_size=100
)


def layer(config: NSAConfig = CONFIG) -> NativeSparseAttention:
    """With gates and phi away from where they start, so that nothing cancels."""
    attention = NativeSparseAttention(128, 8, 2, 32, 64, config)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return attention.cuda()


def results(module: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """The output of `run`, and the gradients of the module's parameters."""
    module.zero_grad()
    out = run()
    out.float().square().sum().backward() if out.dtype != torch.float64 else out.square().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in module.parameters())]


def compare(module: nn.Module, run: Callable[..., Tensor], x: Tensor) -> None:
    """Kernels against the ops in the same dtype and in fp64: output and every parameter's gradient."""
    with use_backend("triton"):
        found = results(module, lambda: run(x))
    with use_backend("torch"):
        plain = results(module, lambda: run(x))
        module.double()
        truth = results(module, lambda: run(x.double() if x.is_floating_point() else x))
    names = ["out", *(name for name, _ in module.named_parameters())]
    for name, *three in zip(names, found, plain, truth, strict=True):
        assert_close_to_fp64(*three, name, largest_score=100.0)


@pytest.mark.parametrize("kind", ["whole", "left padded", "right padded", "packed"])
def test_the_layer_is_the_ops_layer(kind: str) -> None:
    attention, x, kwargs = layer(), torch.randn(2, 400, 128, device="cuda"), {}
    column, lengths = torch.arange(400, device="cuda"), torch.tensor([400, 170], device="cuda")[:, None]
    if kind == "left padded":
        kwargs["attention_mask"] = column >= 400 - lengths
    if kind == "right padded":
        kwargs["attention_mask"] = column < lengths
    if kind == "packed":
        x, kwargs["cu_seqlens"] = x[:1], torch.tensor([0, 3, 3, 250, 400], device="cuda")
    compare(attention, lambda x: attention(x, **kwargs), x)


@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("shared_kv", [False, True])
def test_every_compression_and_shared_keys(compression: str, shared_kv: bool) -> None:
    attention = layer(NSAConfig.from_dict({**CONFIG.to_dict(), "compression": compression, "shared_kv": shared_kv}))
    compare(attention, attention, torch.randn(1, 300, 128, device="cuda"))


def test_bf16_autocast_trains_fp32_weights() -> None:
    attention, x = layer(), torch.randn(1, 400, 128, device="cuda")

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=x.dtype != torch.float64):
            return attention(x)

    assert run(x).dtype == torch.bfloat16
    compare(attention, run, x)


def test_bf16_weights() -> None:
    attention = layer().bfloat16()
    compare(attention, attention, torch.randn(1, 400, 128, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("chunks", [[300], [299, 1], [100, 200], [1, 150, 100] + [1] * 49, [1] * 300], ids=len)
@pytest.mark.parametrize("padded", [False, True])
def test_every_split_gives_the_whole(chunks: list[int], padded: bool) -> None:
    attention, x = layer(), torch.randn(2, 300, 128, device="cuda")
    mask = torch.arange(300, device="cuda") >= torch.tensor([[0], [170 if padded else 0]], device="cuda")

    def split(x: Tensor) -> Tensor:
        cache, outs = NSACache(CONFIG), []
        for start, stop in pairwise([0, *torch.tensor(chunks).cumsum(0).tolist()]):
            seen = mask[:, :stop] if padded else None
            outs.append(attention(x[:, start:stop], cache=cache, attention_mask=seen))
        return torch.cat(outs, dim=1)

    with torch.no_grad():
        with use_backend("triton"):
            found = split(x)
        with use_backend("torch"):
            plain = attention(x, attention_mask=mask)
            attention.double()
            truth = attention(x.double(), attention_mask=mask)
    assert_close_to_fp64(found, plain, truth, largest_score=100.0)


def test_gradients_repeat_bit_by_bit() -> None:
    attention, x = layer().bfloat16(), torch.randn(2, 2000, 128, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        for one, other in zip(*(results(attention, lambda: attention(x)) for _ in range(2)), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_of_training_waits_for_the_device() -> None:
    attention, x = layer().bfloat16(), torch.randn(2, 400, 128, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(attention.parameters(), fused=True)

    def step() -> None:
        attention(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def model() -> NSALlamaForCausalLM:
    config = NSALlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, initializer_range=0.1,
        nsa=CONFIG.to_dict(),
    )  # fmt: skip
    return NSALlamaForCausalLM(config).cuda()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_the_ops_model(checkpointing: bool) -> None:
    built = model().train()
    if checkpointing:
        built.gradient_checkpointing_enable()
    compare(built, lambda ids: built(ids).logits, torch.randint(97, (2, 400), device="cuda"))


def test_packed_documents_of_the_model_stay_apart() -> None:
    built, ids = model().train(), torch.randint(97, (1, 400), device="cuda")
    positions = torch.cat([torch.arange(150), torch.arange(250)])[None].cuda()
    compare(built, lambda ids: built(ids, position_ids=positions).logits, ids)


def test_generation_is_that_of_the_ops() -> None:
    built, ids = model().eval(), torch.randint(97, (2, 300), device="cuda")
    mask = (torch.arange(300) >= torch.tensor([[0], [120]])).long().cuda()
    made = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            made.append(built.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False))
    assert torch.equal(*made)
