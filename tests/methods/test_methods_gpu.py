"""The same methods on a GPU: what they compute and what they read there."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_method_models import FAMILIES, LAID_OVER, LENGTH, run, sharpened, tokens

from nsa.eval.methods import METHODS, MethodCache, attached, split
from nsa.testing.comparison import assert_close_to_fp64

pytestmark = pytest.mark.gpu


def in_float64(model):
    """transformers computes norms, cosines and sines in float32, which two devices round to two values."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    rotary = model.model.rotary_emb
    on_cpu = copy.deepcopy(rotary)
    rotary.forward = lambda x, position_ids: tuple(p.to(x.device) for p in on_cpu(x.cpu(), position_ids.cpu()))
    return model


def rms_norm(norm, x):
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LAID_OVER)
def test_a_gpu_gives_the_numbers_and_counts_of_the_cpu(family, name):
    torch.manual_seed(0)
    model = in_float64(sharpened(FAMILIES[family]()))
    ids, mask = tokens(2), torch.ones(2, LENGTH, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    method = METHODS[name].at_budget(split(LENGTH, 20))
    found = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        with attached(model):
            cache = MethodCache(method, model)
            logits = run(model, cache, ids.to(device), mask.to(device))
        found.append((logits.cpu()[mask.bool()], [cache.counts.per_query(phase) for phase in ("prefill", "decode")]))
    (truth, counts), (got, counted) = found
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)
    assert counted == counts


@pytest.mark.parametrize("name", LAID_OVER)
def test_bfloat16_stays_within_the_error_budget(name):
    torch.manual_seed(0)
    model, ids = FAMILIES["llama"]().eval().requires_grad_(False).cuda(), tokens().cuda()
    model = model.to(torch.bfloat16)
    plain = model(ids).logits
    with attached(model):
        got = run(model, MethodCache(METHODS[name].at_budget(split(LENGTH, 1.0)), model), ids)
    assert_close_to_fp64(got, plain, model.double()(ids).logits, name)
