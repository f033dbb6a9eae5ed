"""What tests of generate() share."""

from functools import partial

import pytest

from nsa.models import NSALlamaForCausalLM, language_model
from nsa.models.captured_step import CapturedStep


@pytest.fixture
def graphs_without_capture(monkeypatch):
    """generate() as on a GPU, each step run where a replay would be."""
    monkeypatch.setattr(language_model, "CapturedStep", partial(CapturedStep, capture=False))
    monkeypatch.setattr(NSALlamaForCausalLM, "_why_no_cuda_graph", lambda self, config: None)
