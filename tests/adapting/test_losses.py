"""The losses of both stages, against loops and full logits; and what each stage trains."""

import pytest
import torch
import torch.nn.functional as F
from dense_families import FITS, NSA, dense
from tiny_llama import tokens

from nsa.adapting import layers
from nsa.adapting.layers import layer_loss, train_what_is_new
from nsa.adapting.low_rank import add_low_rank, merge
from nsa.adapting.predictions import taught_loss
from nsa.models import swap_attention

FAMILIES = ["the dense twin", "qwen3", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_where_every_block_fits_no_layer_errs(family):
    teacher = dense(family)
    ids = tokens(2, FITS)
    assert layer_loss(swap_attention(teacher, nsa=NSA, gate_bias=40.0), teacher, ids, 0.0) < 1e-12
    assert layer_loss(swap_attention(teacher, nsa=NSA, gate_bias=0.0), teacher, ids, 0.0) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_layers_is_that_of_their_outputs_one_by_one(family):
    teacher = dense(family)
    model, ids = swap_attention(teacher, nsa=NSA), tokens(2, 60)
    errors, states = [], teacher(ids, output_hidden_states=True).hidden_states
    for number in model.config.sparse_layers:
        x = teacher.model.layers[number].input_layernorm(states[number])
        with layers.inputs_and_outputs(teacher, [number]) as seen:
            teacher(ids)
        given, wanted = seen[number]
        torch.testing.assert_close(given, x)
        out = model.model.layers[number].self_attn(x)[0]
        errors.append((out - wanted).square().sum() / wanted.square().sum())
    loss = layer_loss(model, teacher, ids, 0.0)
    torch.testing.assert_close(loss, torch.stack(errors).mean().float())


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_1_trains_what_is_new_and_all_of_it(family):
    teacher = dense(family)
    model = swap_attention(teacher, nsa=NSA, gate_bias=0.5)
    train_what_is_new(model)
    before = {id(parameter) for parameter in teacher.parameters()}
    layer_loss(model, teacher, tokens(2, 60), 0.1).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (id(parameter) not in before), name


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_2_is_the_loss_of_the_text_and_the_divergence_from_the_dense_model(family, monkeypatch):
    monkeypatch.setattr("nsa.adapting.predictions.LOGITS", 48 * 7)  # chunks of seven tokens
    teacher, ids = dense(family), tokens(2, 60)
    model = swap_attention(teacher, nsa=NSA)
    said, wanted = (F.log_softmax(one(ids).logits[:, :-1].float(), -1) for one in (model, teacher))
    text = F.nll_loss(said.flatten(0, 1), ids[:, 1:].flatten())
    divergence = (wanted.exp() * (wanted - said)).sum(-1).mean()
    loss = taught_loss(model, teacher, ids, 0.7)
    torch.testing.assert_close(loss, text + 0.7 * divergence)
    loss.backward()
    mine = model.model.layers[1].self_attn.g_proj.weight.grad
    model.zero_grad()
    (text + 0.7 * divergence).backward()
    torch.testing.assert_close(mine, model.model.layers[1].self_attn.g_proj.weight.grad, rtol=1e-4, atol=1e-7)


def test_low_ranks_begin_as_nothing_train_alone_and_merge_to_the_same():
    ids = tokens(2, 50)
    model = swap_attention(dense("qwen3"), nsa=NSA)
    with torch.no_grad():
        start = model(ids).logits
    add_low_rank(model, 3)
    torch.testing.assert_close(model(ids).logits, start)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained if not layers.is_new(name)} == {"a", "b"}
    assert sum(name.endswith(".a") for name in trained) == 2 * 7
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        moved = model(ids).logits
        merge(model)
        torch.testing.assert_close(model(ids).logits, moved)
    assert not torch.allclose(moved, start)
    assert set(model.state_dict()) == set(swap_attention(dense("qwen3"), nsa=NSA).state_dict())
