"""The configuration: the paper's defaults, every constraint, counts, and strict files."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa.config import NSAConfig
from nsa.testing.brute_force_selection import compression_blocks, num_selection_blocks, visible_compressed


def test_the_defaults_are_the_papers():
    config = NSAConfig()
    assert (config.compress_block_size, config.compress_stride, config.select_block_size) == (32, 16, 64)
    assert (config.num_selected_blocks, config.num_initial_blocks, config.num_local_blocks) == (16, 1, 2)
    assert config.window_size == 512


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_stride": 12}, r"compress_stride \(d\) divides compress_block_size \(l\), got .*=12, .*=32"),
        (
            {"compress_block_size": 48, "compress_stride": 24},
            r"compress_stride \(d\) divides select_block_size \(l'\), got .*=24, .*=64",
        ),
        ({"compress_block_size": 128}, r"compress_block_size \(l\) <= select_block_size \(l'\), got .*=128, .*=64"),
        (
            {"num_selected_blocks": 4, "num_initial_blocks": 2, "num_local_blocks": 3},
            r"num_selected_blocks \(n\) >= num_initial_blocks \+ num_local_blocks, got .*=4, .*=2, .*=3",
        ),
        ({"compression": "median"}, r"compression should be 'mlp', 'linear' or 'mean', got 'median'"),
        ({"shared_kv": 1}, r"shared_kv should be a bool, got 1"),
        ({"window_size": 512.0}, r"window_size should be an int, got 512.0"),
        ({"num_local_blocks": True}, r"num_local_blocks should be an int, got True"),
    ],
)
def test_a_broken_constraint_is_one_line_that_names_the_fields(changes, message):
    with pytest.raises(ValueError, match=rf"^NSAConfig: .*{message}") as caught:
        NSAConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        field.name
        for field in dataclasses.fields(NSAConfig)
        if isinstance(field.default, int) and not isinstance(field.default, bool)
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_every_size_and_count_is_positive(name, value):
    with pytest.raises(ValueError, match=rf"^NSAConfig: expected {name} >= 1, got {name}={value}$"):
        NSAConfig(**{name: value})


def test_fields_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSAConfig().window_size = 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 100))
def test_counts_are_those_of_the_brute_force(stride, strides, more, length):
    config = NSAConfig(
        compress_block_size=strides * stride, compress_stride=stride, select_block_size=(strides + more) * stride
    )
    assert config.num_compressed_blocks(length) == len(compression_blocks(length, config))
    assert config.num_selection_blocks(length) == num_selection_blocks(length, config)
    for position in range(length):
        visible = visible_compressed(position, length, config)
        assert config.num_visible_compressed_blocks(position) == len(visible)


@pytest.mark.parametrize(("length", "keys"), [(8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)])
def test_keys_per_query_are_the_papers_table_4_less_the_block_that_is_not_complete(length, keys):
    # The table counts s/d compressed keys; s/d - 1 blocks of 32 tokens lie inside s tokens.
    assert NSAConfig().keys_per_query(length) == keys - 1


@pytest.mark.parametrize("length", [0, 1, 31, 32, 100, 512, 1024, 2000])
def test_keys_per_query_never_count_keys_that_do_not_exist(length):
    config = NSAConfig()
    assert config.keys_per_query(length) <= config.num_compressed_blocks(length) + 2 * length


def test_json_and_dict_give_the_same_configuration_back():
    config = NSAConfig(
        compress_block_size=8, compress_stride=4, select_block_size=16, compression="mean", shared_kv=True
    )
    assert NSAConfig.from_json(config.to_json()) == config
    assert NSAConfig.from_dict(config.to_dict()) == config
    assert list(json.loads(config.to_json())) == [field.name for field in dataclasses.fields(NSAConfig)]


def test_a_missing_key_takes_its_default():
    assert NSAConfig.from_dict({"window_size": 256}) == NSAConfig(window_size=256)


def test_unknown_keys_are_an_error_that_names_them_and_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown keys \['sliding_window', 'top_k'\]; known keys are .*'window_size'"):
        NSAConfig.from_dict({"top_k": 4, "sliding_window": 256})


def test_the_option_that_is_gone_may_be_false_in_files_of_its_days_and_nothing_else():
    old = NSAConfig(window_size=256).to_dict() | {"second_order": False}
    assert NSAConfig.from_dict(old) == NSAConfig.from_json(json.dumps(old)) == NSAConfig(window_size=256)
    with pytest.raises(ValueError, match=r"^NSAConfig: the option second_order is gone, .*: expected false, got True$"):
        NSAConfig.from_dict(old | {"second_order": True})


@pytest.mark.parametrize(("text", "got"), [("[1]", "list"), ("3", "int"), ("null", "NoneType")])
def test_json_that_is_not_an_object_is_one_clear_line(text, got):
    with pytest.raises(ValueError, match=rf"^NSAConfig: expected a JSON object, got {got}$"):
        NSAConfig.from_json(text)
