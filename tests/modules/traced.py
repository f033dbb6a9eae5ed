"""torch.compile, torch.export, meta and fake tensors: one graph, few compilations, the same numbers."""

import pytest
import torch
from moved import moved
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.infllm_v2 import InfLLMv2Attention
from nsa.training import compiling

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, window_size=24
)
EXACT = {"rtol": 0.0, "atol": 1e-10}


def layer() -> NativeSparseAttention:
    torch.manual_seed(0)
    built = NativeSparseAttention(24, 4, 2, config=CONFIG).double()
    return moved(built, 0.1)


def infllm_v2_layer() -> InfLLMv2Attention:
    config = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=8, topk=2, dense_len=0)
    return InfLLMv2Attention(24, 4, 2, config=config).double()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LAYOUTS = {
    "rows": (2, 90, {}),
    "padded rows": (2, 40, {"attention_mask": torch.tensor([[0] * 9 + [1] * 31, [1] * 20 + [0] * 3 + [1] * 17])}),
    "packed": (1, 90, {"cu_seqlens": torch.tensor([0, 3, 3, 50, 90, 90], dtype=torch.int32)}),
    "given positions": (1, 50, {"position_ids": torch.arange(7, 57)[None]}),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("built", [layer, infllm_v2_layer])
def test_a_compiled_layer_is_one_graph_with_the_same_outputs_and_gradients(built, name):
    (rows, columns, arguments), built = LAYOUTS[name], built()
    x = torch.randn(rows, columns, 24, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn_like(x)
    inputs = [x, *built.parameters()]
    expected = built(x, **arguments)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    actual = compiled(x, **arguments)
    torch.testing.assert_close(actual, expected, **EXACT)
    for one, two in zip(
        torch.autograd.grad(actual, inputs, d_out), torch.autograd.grad(expected, inputs, d_out), strict=True
    ):
        torch.testing.assert_close(one, two, **EXACT)


def test_lengths_and_numbers_of_documents_compile_anew_once():
    built, counter = layer(), CompileCounterWithBackend("eager")
    compiled = torch.compile(built, fullgraph=True, backend=counter)
    for columns in (64, 100, 300, 80, 513):
        compiled(torch.randn(2, columns, 24, dtype=torch.float64))
    assert counter.frame_count == 2  # one length, then any
    before = counter.frame_count
    for columns, documents in ((256, 4), (256, 9), (256, 33), (512, 10), (130, 65)):
        ends = torch.linspace(0, columns, documents + 1).to(torch.int32)
        compiled(torch.randn(1, columns, 24, dtype=torch.float64), cu_seqlens=ends)
    assert counter.frame_count <= before + 2


@pytest.mark.parametrize("built", [layer(), infllm_v2_layer()], ids=["nsa", "infllm_v2"])
def test_all_blocks_are_one_graph_more_and_the_way_back_is_none(built):
    own, counter = built.config, CompileCounterWithBackend("eager")
    compiled, everything, graphs = torch.compile(built, fullgraph=True, backend=counter), own.with_all_blocks(160), []
    for length, config in ((80, own), (160, everything), (160, own), (120, everything), (80, own), (160, everything)):
        built.take(config)
        x = torch.randn(1, length, 24, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), built(x), **EXACT)
        graphs.append(counter.frame_count)
    assert graphs[2:] == [graphs[2]] * 4


def test_training_on_packed_documents_compiles_once(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch.compiler.config, "dynamic_sources", "")
    options = compiling._options
    monkeypatch.setattr(compiling, "_options", lambda graphs: options(graphs) | {"backend": counter})
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    model = NSALlamaForCausalLM(
        NSALlamaConfig(attention="nsa", nsa=CONFIG.to_dict(), vocab_size=16, num_hidden_layers=1, **sizes)
    ).train()
    compiling.compile_parts(model, on_cpu=True, cuda_graphs=False)
    for documents, longest in ((4, 64), (9, 64), (2, 128), (33, 16)):
        ids, ends = torch.randint(16, (1, 128)), torch.linspace(0, 128, documents + 1).to(torch.int32)
        model(input_ids=ids, labels=ids, cu_seq_lens_q=ends, max_length_q=longest).loss.backward()
    assert counter.frame_count == len(compiling.PARTS)


def test_nothing_of_a_packed_forward_depends_on_values_of_the_lengths():
    """Fake tensors have none: a read on the host would raise."""
    with FakeTensorMode():
        built = NativeSparseAttention(24, 4, 2, config=CONFIG)
        x = torch.randn(1, 90, 24, requires_grad=True)
        out = built(x, cu_seqlens=torch.tensor([0, 3, 50, 90], dtype=torch.int32))
        out.sum().backward()
    assert out.shape == x.grad.shape == (1, 90, 24)


def test_meta_tensors_have_the_shapes_of_the_result():
    with torch.device("meta"):
        out = NativeSparseAttention(24, 4, 2, config=CONFIG)(torch.empty(2, 50, 24))
    assert out.shape == (2, 50, 24)


def test_an_exported_layer_serves_other_lengths():
    built = layer()
    strides = torch.export.Dim("strides", min=4, max=1024)
    x = torch.randn(2, 100, 24, dtype=torch.float64)
    program = torch.export.export(built, (x,), dynamic_shapes={"x": {1: CONFIG.compress_stride * strides}}).module()
    y = torch.randn(2, 336, 24, dtype=torch.float64)
    for one in (x, y):
        torch.testing.assert_close(program(one), built(one), **EXACT)
