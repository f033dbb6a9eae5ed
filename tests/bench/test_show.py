"""Tables, plot and notes from a result that was made up."""

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from nsa.bench.arguments import ShowArguments
from nsa.bench.result import Entry, Result
from nsa.bench.show import crossover, markdown, show, tables, write


def canned() -> Result:
    """NSA takes 2 ms at 1k and 4 ms at 4k; dense 1 and 16 forward, 2 and 24 backward."""
    entries = []
    for length, own, dense in ((1024, 2.0, 1.0), (4096, 4.0, 16.0)):
        for inputs in ("random", "correlated"):
            rivals = {"cuDNN": dense, "FlashAttention-2": 2 * dense} if inputs == "random" else {}
            facts, flops = {"U4": 53.25}, {"NSA": own * 4e11}
            gib = {"NSA": 1.5, **dict.fromkeys(rivals, 0.75)}
            entries += [
                Entry(length=length, inputs=inputs, part="forward", ms={"NSA": own, **rivals}, gib=gib,
                      flops=flops, facts=facts),
                Entry(length=length, inputs=inputs, part="backward", flops=flops,
                      ms={"NSA": own, **({"cuDNN": 1.5 * dense} if rivals else {})}),
                Entry(length=length, inputs=inputs, part="kernels", ms={"forward: window": own / 4},
                      flops={"forward: window": 1e11}),
            ]  # fmt: skip
    facts = {"device": "a device", "date": "2026-01-01", "commit": "abc"}
    return Result(bench="kernels", facts=facts, shape={"heads": 64}, matrix_rate=8e14, entries=entries)


def test_a_result_survives_json() -> None:
    assert Result.from_json(canned().to_json()) == canned()


def test_tables_hold_times_ratios_rates_and_shares() -> None:
    found = {table.title.split(":")[0]: table for table in tables(canned())}
    forward = found["forward"]
    assert forward.header == [
        "tokens", "inputs", "U4", "NSA, ms", "TFLOP/s", "of the limit", "cuDNN", "FlashAttention-2",
    ]  # fmt: skip
    # 8e11 FLOPs in 2 ms are 400 TFLOP/s, half of what matrix products reach.
    assert forward.rows[0] == ["1,024", "random", "53.2", "2.00", "400", "50%", "1.00 (0.50x)", "2.00 (1.00x)"]
    assert forward.rows[1][-2:] == ["", ""]
    assert found["backward"].rows[2][-1] == "24.0 (6.00x)"
    assert found["each kernel alone, random inputs"].rows == [["forward: window", "0.50 (200)", "1.00 (100)"]]
    assert found["peak memory, forward + backward, on top of inputs and weights"].rows[0][2:] == [
        "1.50",
        "0.75",
        "0.75",
    ]


def test_the_crossover_lies_between_the_lengths_around_it() -> None:
    # The ratio rises from 1/2 to 4 over a factor of 4 in length: it is 1 after a third of that, in logarithms.
    assert crossover(canned(), ["forward"]) == pytest.approx(1024 * 4 ** (1 / 3))
    both = crossover(canned(), ["forward", "backward"])
    assert both == pytest.approx(1024 * 4 ** (math.log(4 / 2.5) / math.log(5 / (2.5 / 4))))


def test_a_run_that_was_cut_off_is_shown_as_far_as_it_came() -> None:
    whole = canned()
    cut = replace(whole, entries=whole.entries[:-5])  # at 4k forward alone
    assert crossover(cut, ["forward"]) == crossover(whole, ["forward"])
    assert crossover(cut, ["forward", "backward"]) is None
    assert "| 4,096 | random |" in markdown(cut)


def test_there_is_no_crossover_where_nsa_never_leads() -> None:
    slow = [replace(x, ms={**x.ms, "NSA": 1000.0}) for x in canned().entries]
    assert crossover(replace(canned(), entries=slow), ["forward"]) is None
    assert "at no length measured" in markdown(replace(canned(), entries=slow))


def test_markdown_and_plot_are_written(tmp_path) -> None:
    write(canned(), tmp_path / "kernels")
    text = (tmp_path / "kernels.md").read_text()
    assert "| 4,096 | random | 53.2 | 4.00 | 400 | 50% | 16.0 (4.00x) | 32.0 (8.00x) |" in text
    assert "device a device, date 2026-01-01, commit abc" in text
    assert ElementTree.parse(tmp_path / "kernels.svg").getroot().tag.endswith("svg")


def test_show_reads_a_result_again(tmp_path, capsys) -> None:
    (tmp_path / "a.json").write_text(canned().to_json())
    show(ShowArguments(result=tmp_path / "a.json", output=tmp_path / "b"))
    assert "FlashAttention-2" in capsys.readouterr().out
    assert (tmp_path / "b.md").exists()
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no result of nsa bench"):
        show(ShowArguments(result=tmp_path / "a.json"))


def test_decoding_is_shown_in_microseconds_with_its_floor_and_cells_without_room(tmp_path) -> None:
    facts = {"batch": 32.0, "floor": 87.06, "dense floor": 1042.75}
    ms = {"NSA": 0.125, "NSA, pages": 0.15, "cuDNN": 0.9375}
    entries = [
        Entry(length=65536, inputs="batch 32", part="attention", ms=ms, facts=facts),
        Entry(length=131072, inputs="batch 32", part="attention", ms={}, facts=facts | {"needs GiB": 290.2}),
    ]
    result = Result(bench="decode", facts={"device": "a device"}, shape={}, matrix_rate=8e14, entries=entries)
    (table,) = tables(result)
    assert table.header == ["tokens", "batch", "floor", "dense floor", "NSA", "NSA, pages", "cuDNN"]
    assert table.rows[0] == ["65,536", "32", "87.1", "1042.8", "125.0", "150.0", "937.5 (7.50x)"]
    assert table.rows[1][4:] == ["no room for 290 GiB", "", ""]
    write(result, tmp_path / "decode")
    assert ElementTree.parse(tmp_path / "decode.svg").getroot().tag.endswith("svg")
