"""Whether the sizes that a bench was asked for can be; ValueError in one line where they cannot."""

from collections.abc import Sequence
from dataclasses import asdict

from nsa.bench.arguments import RIVALS, DecodeArguments, GenerateArguments, KernelArguments, Measured, TrainArguments


def check(arguments: Measured) -> None:
    lengths = arguments.lengths
    if isinstance(arguments, KernelArguments):
        _check_rivals(arguments.rivals, RIVALS)
    if isinstance(arguments, DecodeArguments):
        _check_rivals(arguments.rivals, RIVALS[:2])
    if isinstance(arguments, GenerateArguments):
        lengths = (*lengths, *arguments.generate_at, *arguments.prompts)
        if not lengths or min(lengths) < 1:
            raise ValueError(
                "--lengths, --generate-at and --prompts: expected positive numbers of tokens, or none to leave a part "
                f"out; got {list(arguments.lengths)}, {list(arguments.generate_at)} and {list(arguments.prompts)}"
            )
    _check_counts(arguments, lengths)
    if isinstance(arguments, GenerateArguments):
        batches, new_tokens = arguments.batches, arguments.new_tokens
        if not batches or min(batches) < 1 or new_tokens < 4:
            raise ValueError(
                f"--batches and --new-tokens: expected at least 1 and 4, got {list(batches)} and {new_tokens}"
            )
    if isinstance(arguments, DecodeArguments) and (not arguments.batches or min(arguments.batches) < 1):
        raise ValueError(f"--batches: expected positive numbers of rows, got {list(arguments.batches)}")
    if isinstance(arguments, TrainArguments):
        for name in ("models", "layouts", "attentions", "modes"):
            if not getattr(arguments, name):
                raise ValueError(f"--{name}: expected one or more, got none")


def _check_rivals(given: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"--rivals: expected some of {', '.join(map(repr, known))}, got {unknown[0]!r}")


def _check_counts(arguments: Measured, lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--lengths: expected positive numbers of tokens, got {list(lengths)}")
    numbers = {name: value for name, value in asdict(arguments).items() if type(value) is int}
    for name, value in numbers.items():
        least = 0 if name in ("dense_prompt", "workers", "seed") else 1
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    heads, kv_heads = numbers.get("heads", 1), numbers.get("kv_heads", 1)
    if heads % kv_heads:
        raise ValueError(f"--heads: expected a multiple of --kv-heads, got {heads} and {kv_heads}")
