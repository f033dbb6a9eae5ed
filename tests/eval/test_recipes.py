"""`nsa report`: what runs recorded, by recipe and seed; one line for folders in which no run has recorded anything."""

import json

import pytest

from nsa.cli import main
from nsa.eval.recipes import read_recipes
from nsa.eval.recipes_report import table

# Losses after 100 and 200 tokens.
LOSSES = {
    ("dense", 0): (3.0, 2.0),
    ("dense", 1): (3.5, 2.5),
    ("nsa <b>", 0): (3.25, 2.125),
    ("nsa <b>", 1): (3.5, 2.375),
    ("window", 2): (4.0, 3.0),
}


def write(folder, name, seed, losses, **more):
    run = folder / f"{name}-seed{seed}"
    run.mkdir()
    attention = name.split()[0]
    config = {"seed": seed, "attention": attention, "out": str(run), **more}
    (run / "train_config.json").write_text(json.dumps(config))
    lines = []
    for step, loss in enumerate(losses, start=1):
        lines.append(
            {"step": step, "seconds": 60.0 * step, "tokens": 100 * step, "tokens_per_second": 10.0, "loss": 9.0}
        )
        lines.append({"step": step, "seconds": 60.0 * step, "eval_text_loss": loss, "eval_retrieval_loss": loss + 1})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval_te')
    return run


@pytest.fixture
def runs(tmp_path):
    return [write(tmp_path, name, seed, losses) for (name, seed), losses in LOSSES.items()]


def test_seeds_of_one_configuration_are_one_recipe(runs):
    recipes = {recipe.name: recipe for recipe in read_recipes(runs)}
    assert list(recipes) == ["dense", "nsa <b>", "window"]
    assert recipes["dense"].curve("eval_text_loss") == {100: (3.25, 3.0, 3.5), 200: (2.25, 2.0, 2.5)}
    assert recipes["dense"].runs[1].minutes == 2


def test_recipes_in_folders_of_one_name_are_told_apart(tmp_path):
    folders = []
    for parent, size in (("x", 1), ("y", 2)):
        (tmp_path / parent).mkdir()
        folders.append(write(tmp_path / parent, "nsa", 0, (3.0,), vocab_size=size))
    assert [recipe.name for recipe in read_recipes(folders)] == [str(folder) for folder in folders]


def test_differences_are_of_equal_seeds_after_equal_tokens(runs):
    dense, nsa, window = read_recipes(runs)
    assert nsa.against(dense, "eval_text_loss") == ([0.125, -0.125], 200)
    assert window.against(dense, "eval_text_loss") is None
    found = table([dense, nsa, window], dense)
    rows = {row[0]: dict(zip(found.header, row, strict=True)) for row in found.rows}
    assert rows["nsa <b>"]["held-out loss"] == "2.2500 (2.1250 2.3750)"
    assert found.rows[1][4] == "+0.0000 (-1.5883 to +1.5883)"  # t of one degree of freedom, 12.706, times .125
    assert found.rows[2][4] == "no shared seed"


def test_a_run_under_way_is_compared_where_the_other_was(runs, tmp_path):
    short = write(tmp_path, "nsa short", 0, (3.5,), num_layers=3)
    dense, own = read_recipes([runs[0], short])
    assert own.against(dense, "eval_text_loss") == ([0.5], 100)
    assert dense.against(own, "eval_text_loss") == ([-0.5], 100)
    assert table([own, dense], own).rows[1][4] == "-0.5000 at 0.0M"


def test_the_page_has_the_table_the_curves_and_no_markup_of_a_folders_name(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(page), "--json"]) == 0
    html = page.read_text()
    assert "<b>" not in html.split("<main>")[1].replace("<b></b>", "")
    assert html.count("<svg") == 2
    assert "2.1250 2.3750" in html
    plain = {recipe["recipe"]: recipe for recipe in json.loads(capsys.readouterr().out)}
    assert plain["window"]["runs"][0]["eval_text_loss"] == {"100": 4.0, "200": 3.0}


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: (run / "train_config.json").unlink(), "holds no run of nsa train"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "expected the records of a run"),
        (lambda run: (run / "train_config.json").write_text('{"seed": []}'), "expected an integer seed"),
        (lambda run: (run / "train_config.json").write_text("{"), "is no JSON"),
    ],
)
def test_what_is_no_run_is_one_line(runs, capsys, break_it, said):
    break_it(runs[0])
    assert main(["report", str(runs[0])]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_one_run_twice_and_what_is_unknown_are_one_line(runs, capsys):
    assert main(["report", str(runs[0]), str(runs[0])]) == 2
    assert "are the same run" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "name at least one run's folder" in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--reference", "x"]) == 2
    assert "--reference x: expected one of dense" in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--eval", str(runs[0] / "train_config.json")]) == 2
    assert "is no result of `nsa eval` or `nsa compare`" in capsys.readouterr().err
