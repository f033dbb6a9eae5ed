"""The command line of `nsa bench`, on a machine without CUDA."""

import pytest
import torch

from nsa.bench.arguments import DecodeArguments, KernelArguments, ModuleArguments, StepArguments
from nsa.cli import main, parse


def test_each_bench_is_a_subcommand_with_its_own_options() -> None:
    assert parse("bench", ["kernels", "--lengths", "8", "16", "--rivals"]).what == KernelArguments(
        lengths=(8, 16), rivals=()
    )
    assert parse("bench", ["module", "--hidden-size", "64"]).what == ModuleArguments(hidden_size=64)
    assert parse("bench", ["step", "--preset", "small", "--layers", "2"]).what == StepArguments(
        preset="small", layers=2
    )
    assert parse("bench", ["decode", "--lengths", "8", "--batches", "1", "--rivals"]).what == DecodeArguments(
        lengths=(8,), batches=(1,), rivals=()
    )
    assert parse("bench", ["kernels", "--value-dim", "64"]).what == KernelArguments(value_dim=64)


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "kernels"], ["bench", "step"], ["bench", "show"]])
def test_help_has_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    assert "Examples:" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
@pytest.mark.parametrize("bench", ["kernels", "module", "step", "train", "decode", "generate"])
def test_without_cuda_it_is_one_line(bench: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", bench]) == 2
    assert capsys.readouterr().err == "nsa bench: error: nsa bench measures a CUDA device, and PyTorch sees none here\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--rivals", "me"], "--rivals: expected some of 'cuDNN', 'FlashAttention-2', "),
        (["kernels", "--lengths", "0"], "--lengths: expected positive numbers of tokens, got [0]"),
        (["module", "--repetitions", "0"], "--repetitions: expected at least 1, got 0"),
        (["decode", "--rivals", "FlexAttention"], "--rivals: expected some of 'cuDNN', 'FlashAttention-2', got 'Flex"),
        (["decode", "--batches", "0"], "--batches: expected positive numbers of rows, got [0]"),
        (["decode", "--value-dim", "0"], "--value-dim: expected at least 1, got 0"),
        (["nothing"], "nothing"),
        (["show", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
