"""Projections, gates and phi are ordinary Linears: called as modules where they are more than their weights."""

import copy

import pytest
import torch
from moved import moved
from torch import nn

from nsa.cache import StaticNSACache
from nsa.config import NSAConfig
from nsa.modules.attention import NativeSparseAttention

EXACT = {"rtol": 0.0, "atol": 1e-10}


def layer(compression: str = "mlp") -> NativeSparseAttention:
    torch.manual_seed(0)
    config = NSAConfig(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=10,
        compression=compression,
    )  # fmt: skip
    built = NativeSparseAttention(24, 4, 2, config=config).double().eval()
    return moved(built, 0.2)


class Adapter(nn.Module):
    """A Linear and something beside it, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False).to(base.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("compression", ["mlp", "linear"])
def test_hooks_of_every_linear_fire_and_change_nothing(compression):
    built = layer(compression)
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    expected = built(x)
    linears = {name: module for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    seen = set()
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    torch.testing.assert_close(built(x), expected, **EXACT)
    assert seen == set(linears)


@pytest.mark.parametrize("name", ["q_proj", "g_proj", "k_proj_cmp", "compress_k.hidden", "compress_v.out", "o_proj"])
def test_an_adapter_counts_as_its_merged_weights_do_also_in_a_decoding_step(name):
    plain, adapted = layer(), layer()
    parent, _, leaf = name.rpartition(".")
    adapter = Adapter(adapted.get_submodule(name))
    setattr(adapted.get_submodule(parent), leaf, adapter)
    with torch.no_grad():
        plain.get_submodule(name).weight.add_(adapter.more.weight)
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    expected = plain(x)
    torch.testing.assert_close(adapted(x), expected, **EXACT)
    with torch.no_grad():
        cache = StaticNSACache(adapted.config, 64)
        outs = [adapted(x[:, :30], cache=cache), *(adapted(x[:, i : i + 1], cache=cache) for i in range(30, 40))]
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, **EXACT)


def test_names_are_not_those_of_llamas_mlp():
    names = {name.rpartition(".")[2] for name, module in layer().named_modules() if isinstance(module, nn.Linear)}
    assert not names & {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("compression", ["mlp", "linear"])
def test_a_state_with_the_old_names_loads(compression):
    built = layer(compression)
    state = copy.copy(built.state_dict())
    for name in ("weight", "bias"):
        state[f"gate_proj.{name}"] = state.pop(f"g_proj.{name}")
    if compression == "linear":
        for kind in "kv":
            state[f"compress_{kind}.weight"] = state.pop(f"compress_{kind}.out.weight")
    fresh = NativeSparseAttention(24, 4, 2, config=built.config).double()
    fresh.load_state_dict(state)
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    assert torch.equal(fresh(x), built(x))


@pytest.mark.parametrize(
    ("columns", "arguments"),
    [
        (1, {}),
        (7, {}),
        (12, {"cu_seqlens": torch.tensor([0, 3, 6, 12])}),
        (6, {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1]])}),
    ],
)
def test_sequences_shorter_than_a_block_leave_gradients_of_zeros(columns, arguments):
    built = layer()
    built(torch.randn(1, columns, 24, dtype=torch.float64), **arguments).sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())
    assert not built.compress_k.hidden.weight.grad.any()
    assert built.v_proj.weight.grad.any()


def test_a_layer_can_be_copied():
    built = layer("linear")
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(built)(x), built(x))
