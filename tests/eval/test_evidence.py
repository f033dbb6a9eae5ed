"""`nsa report` with files of nsa eval and nsa compare: models by recipe, intervals over seeds, one page of all."""

import json
import math

import pytest
from test_recipes import write
from test_report import Page, example_result

from nsa.cli import main
from nsa.eval.costs import Cost, Costs
from nsa.eval.judged import interval_of, read_judged
from nsa.eval.judged_table import judged_blocks
from nsa.eval.recipes import read_recipes
from nsa.eval.result import Result
from nsa.eval.seeds import over_seeds, student
from nsa.eval.tasks import Row


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_quantiles_of_student_are_those_of_the_tables(freedom, expected):
    assert student(freedom) == pytest.approx(expected, abs=6e-4)


def test_the_interval_over_seeds_is_students_and_none_of_one_seed():
    mean, low, high = over_seeds([1.0, 2.0, 3.0])  # standard deviation 1, error 1 / sqrt(3)
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), abs=1e-3)
    assert all(map(math.isnan, over_seeds([1.0])[1:]))


def test_seeds_that_all_find_nothing_do_not_make_it_certain():
    none = Row.of_answers("needle", {"length": 64}, [False] * 10, 0.01)
    assert interval_of([none, none]) == pytest.approx((0, 0, 0.161), abs=1e-3)  # Wilson's of 0 of 20
    some = Row.of_answers("needle", {"length": 64}, [True] * 5 + [False] * 5, 0.01)
    assert interval_of([none, some]) == (0.25, 0.0, 1.0)  # of two seeds so far apart nothing is known


# Losses of two samples, by model.
LOSSES = {"dense-seed0": (2.0, 2.5), "dense-seed1": (2.25, 2.5), "nsa-seed0": (2.125, 2.75), "nsa-seed1": (2.0, 2.5),
          "foreign": (4.0, 4.5)}  # fmt: skip
FOUND = {"dense-seed0": 4, "dense-seed1": 4, "nsa-seed0": 3, "nsa-seed1": 4, "foreign": 0}


def result_file(path, names, lengths=(64,), folder="elsewhere", **parameters):
    """Needles of depth 0 and 1, and the loss of all positions and of two buckets."""
    rows, models = {}, []
    for name in names:
        rows[name] = [
            Row.of_answers("needle", {"length": length, "depth": depth}, [i < FOUND[name] for i in range(4)], 0.01)
            for length in lengths
            for depth in (0.0, 1.0)
        ]
        for length in lengths:
            for positions, add in (("all", 0.0), ([1, 32], 0.5), ([32, 64], -0.5)):
                losses = [loss + add for loss in LOSSES[name]]
                rows[name].append(Row.of_losses("perplexity", {"length": length, "positions": positions}, losses))
        models.append({**example_result().models[0], "name": name, "attention": name.split("-")[0],
                       "folder": f"{folder}/{name}"})  # fmt: skip
    tasks = {"needle": {"lengths": list(lengths), "seed": 0} | parameters, "perplexity": {"length": lengths[0]}}
    run = example_result().run | {"command": f"nsa eval {' '.join(names)} --output {path.name}"}
    Result(models=models, tasks=tasks, rows=rows, run=run, notes=["a note"]).save(path)
    return path


@pytest.fixture
def runs(tmp_path):
    both = [("dense", 0), ("dense", 1), ("nsa", 0), ("nsa", 1)]
    more = {"nsa": {"nsa": {"window_size": 32, "num_selected_blocks": 4, "select_block_size": 16,
                            "compress_block_size": 16, "compress_stride": 8}, "curriculum": ["256x10"]},
            "dense": {"curriculum": ["256x10"]}}  # fmt: skip
    return [write(tmp_path, name, seed, (3.0, 2.0 + 0.125 * seed), **more[name]) for name, seed in both]


def lines_of(judged, reference):
    return {line.where: dict(zip(judged.columns, line.cells, strict=True))
            for block in judged_blocks(judged, reference) for line in block.lines}  # fmt: skip


def test_models_of_a_recipes_runs_are_one_column_whatever_file_judged_them(runs, tmp_path):
    one = result_file(tmp_path / "one.json", ["nsa-seed0", "dense-seed0", "foreign"])
    two = result_file(tmp_path / "two.json", ["dense-seed1", "nsa-seed1"], folder="other/machine")
    far = result_file(tmp_path / "far.json", ["nsa-seed0"], lengths=(128,))
    judged = read_judged([one, two, far], read_recipes(runs))
    assert {name: sorted(column.rows, key=str) for name, column in judged.columns.items()} == {
        "dense": [0, 1], "nsa": [0, 1], "foreign": [None]
    }  # fmt: skip
    assert judged.tasks["needle"]["lengths"] == [64, 128]
    lines = lines_of(judged, "dense")
    needle = lines["64 tokens"]
    assert needle["nsa"] == ("87.5%", "14/16 (0-100%)")
    assert needle["foreign"][0] == "0.0%"
    assert lines["128 tokens"]["nsa"] == ("75.0%", "6/8 (41-93%)")  # one seed: as nsa eval has it
    assert lines["128 tokens"]["dense"] == ("–", "no result")
    loss = lines["64 tokens, all positions"]
    # Differences of the seeds .1875 and -.125: mean .03125, their standard deviation .221, times 12.706 / sqrt(2).
    assert loss["nsa"] == ("2.344", "+0.031 (-1.954 to +2.017)")
    assert loss["dense"] == ("2.312", "1.518 to 3.107")
    assert loss["foreign"] == ("4.250", "± 0.250")  # no seed of its own to set beside one of dense


def test_charts_see_each_recipe_once(runs, tmp_path):
    one = result_file(tmp_path / "one.json", ["nsa-seed0", "dense-seed0", "nsa-seed1"])
    pooled = read_judged([one], read_recipes(runs)).pooled("dense")
    assert (pooled.names, pooled.reference) == (["dense", "nsa"], "dense")
    needle = pooled.of_task("nsa", "needle")[0]
    assert (needle.correct, needle.n, needle.value) == (7, 8, 0.875)
    loss = pooled.of_task("nsa", "perplexity")[0]
    assert loss.values == [2.0625, 2.625]  # sample by sample


def test_a_model_that_was_not_asked_leaves_its_place_empty(runs, tmp_path):
    one = result_file(tmp_path / "one.json", ["nsa-seed0", "dense-seed0"])
    result = Result.from_json(one.read_text())
    where = {"length": 64, "region": "beyond the stacked windows"}
    result.rows["nsa-seed0"].append(Row.of_answers("recall", where, [True], 0.01))
    result.tasks["recall"] = {"length": 64}
    result.save(one)
    lines = lines_of(read_judged([one], read_recipes(runs)), "dense")
    assert lines["64 tokens, beyond the stacked windows"] == {
        "nsa": ("100.0%", "1/1 (21-100%)"),
        "dense": ("–", "no result"),
    }
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--eval", str(one), "--output", str(page)]) == 0


def compare_file(path):
    result = example_result()
    for model, name in zip(result.models, ("quest", "full", "trained nsa"), strict=True):
        result.rows[name] = result.rows.pop(model["name"])
        model |= {"name": name, "attention": "dense" if name == "full" else name}
    each = {"length": 128, "sizes": {"pages": 4}, "sparse_in": ("decode",), "paper": "https://arxiv.org/abs/1"}
    read = {"queries": {"prefill": 2, "decode": 2}, "attended": {"prefill": 90, "decode": 100}}
    costs = Costs([Cost(method=name, **each, **read) for name in result.names], {128: 50}, "trained nsa")
    path.write_text(json.dumps({**json.loads(result.to_json()), **costs.plain()}))
    return path


def test_the_page_is_of_everything(runs, tmp_path, capsys):
    one = result_file(tmp_path / "one.json", ["nsa-seed0", "nsa-seed1", "dense-seed0", "dense-seed1", "foreign"])
    page, compared = tmp_path / "page.html", compare_file(tmp_path / "compare.json")
    files = ["--eval", str(one), "--compare", str(compared), "--output", str(page), "--json"]
    assert main(["report", *map(str, runs), *files]) == 0
    html = page.read_text()
    found = Page(html)
    assert found.ids == ["recipes", "results", "context", "needle", "costs", "run"]
    assert "://" not in html
    for words in (
        "2 seeds", "95% t-interval over seeds", "attention = nsa, not dense", "128 tokens, budget: 50 keys a query",
        "as trained nsa reads", str(one), str(compared), "nsa eval nsa-seed0", "a note", "127 of 256",
        "quest",
    ):  # fmt: skip
        assert words in found.text, words
    assert html.count("needle heat map of") == 3  # of two recipes and a stranger
    plain = {recipe["recipe"]: recipe["runs"][0] for recipe in json.loads(capsys.readouterr().out)}
    # 31 compressed keys, 64 in blocks, 32 in the window; dense reads all.
    assert (plain["nsa"]["keys_per_query"], plain["dense"]["keys_per_query"]) == (31 + 64 + 32, 256)
    judged = [row for row in plain["nsa"]["judged"] if row["task"] == "perplexity"]
    assert judged[0]["value"] == pytest.approx(2.4375)


def test_what_cannot_stand_side_by_side_is_one_line(runs, tmp_path, capsys):
    one = result_file(tmp_path / "one.json", ["nsa-seed0"])
    again = result_file(tmp_path / "again.json", ["nsa-seed0"])
    moved = result_file(tmp_path / "moved.json", ["nsa-seed0"], lengths=(128,), folder="other")
    asked = result_file(tmp_path / "asked.json", ["nsa-seed1"], seed=1)
    no_costs = result_file(tmp_path / "compare.json", ["nsa-seed1"])
    for files, said in (
        (["--eval", one, again], "judges elsewhere/nsa-seed0 by needle once more; give one such file"),
        (["--eval", one, moved], "were both judged as seed 0 of nsa; give one of them"),
        (["--eval", one, asked], "models compare where they answer the same questions"),
        (["--compare", no_costs], "has no costs: expected the compare.json of a newer `nsa compare`"),
    ):
        assert main(["report", *map(str, runs), *map(str, files)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
