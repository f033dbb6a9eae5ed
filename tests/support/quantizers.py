"""Quantizers as from_pretrained takes them; a test is skipped where the package is not installed."""

import warnings

import pytest
from transformers import QuantoConfig, TorchAoConfig


def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def quanto():
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


QUANTIZERS = {"torchao": torchao, "quanto": quanto}
