"""Stages that select all blocks: as a model with enough blocks trains, and nothing of it stays."""

from dataclasses import replace

import pytest
import torch
from runs import At, interrupt

from nsa.modules.layer import SparseLayer
from nsa.training.curriculum import parse_stage
from nsa.training.prepare import make_model
from nsa.training.train import train

pytestmark = pytest.mark.filterwarnings("default")  # the Trainer's own


def layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


def test_its_spelling_is_read_back():
    stage = parse_stage("512x4:retrieval=0.25:blocks=all")
    assert stage.all_blocks
    assert parse_stage(str(stage)) == stage
    with pytest.raises(ValueError, match="got the option 'blocks=3'"):
        parse_stage("512x4:blocks=3")


@pytest.mark.parametrize("attention", ["nsa", "infllm_v2"])
def test_it_trains_as_a_model_does_that_has_as_many_blocks(config, attention):
    length = config.stages[-1].length
    config = replace(config, attention=attention, selector_loss=0.5)
    dense = replace(
        config, out=config.out / "dense", nsa=config.nsa.with_all_blocks(length),
        infllm_v2=config.infllm_v2.with_all_blocks(length),
    )  # fmt: skip
    curriculum = tuple(f"{stage}:blocks=all" for stage in config.curriculum)
    found, expected = train(replace(config, out=config.out / "all", curriculum=curriculum)), train(dense)
    sparse = train(replace(config, out=config.out / "sparse"))
    weights = [dict(model.named_parameters()) for model in (found, expected, sparse)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    own = getattr(found.config, f"{attention}_config")
    assert own == getattr(config, attention)
    assert {layer.config for layer in layers(found)} == {own}


def test_between_its_steps_and_after_a_stop_layers_have_their_own_sizes(config):
    length = config.stages[-1].length
    seen = []

    class Watch(At):
        def on_step_begin(self, args, state, control, model, **_):
            seen.append({layer.config for layer in layers(model)})

        def on_evaluate(self, args, state, control, model, **_):
            assert {layer.config for layer in layers(model)} == {config.nsa}

    config = replace(config, curriculum=(f"{length}x3:blocks=all", f"{length}x3"), eval_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Watch(5, interrupt)])
    assert seen == [{config.nsa.with_all_blocks(length)}] * 3 + [{config.nsa}] * 2


def test_a_model_whose_training_cannot_begin_or_ends_by_an_error_has_neither_all_blocks_nor_the_selectors_loss(config):
    made = []

    def make(*given):
        made.append(make_model(*given))
        return made[-1]

    def refuse(**_):
        raise ValueError("no trainer")

    def fail(model):
        assert {layer.selector_weight for layer in layers(model)} == {0.5}
        raise ValueError("no step")

    config = replace(config, curriculum=("64x3:blocks=all",), selector_loss=0.5)
    for what in ({"trainer": refuse}, {"callbacks": [At(1, fail)]}):
        with pytest.raises(ValueError, match=r"no trainer|no step"):
            train(replace(config, out=config.out / str(len(made))), make=make, **what)
    assert {(layer.config, layer.selector_weight) for model in made for layer in layers(model)} == {(config.nsa, 0.0)}


def test_ranks_that_share_sequences_cannot(config):
    with pytest.raises(ValueError, match=r"blocks=all needs whole sequences on a rank: expected cp=1, got cp=2"):
        replace(config, cp=2, curriculum=("64x3:blocks=all",)).validate()
