"""`nsa corpus`: each text once, held-out packages apart, nothing of a package run, whole or not there."""

import csv
import shutil
import subprocess
import tarfile
import zipfile
from io import BytesIO

import pytest

from nsa.cli import main
from nsa.eval.text import held_out_texts
from nsa.training.building import build as building
from nsa.training.building.arguments import CorpusArguments
from nsa.training.building.build import CONTENTS
from nsa.training.building.download import download, downloaded
from nsa.training.building.table import OWN_TABLE, Package, read_table
from nsa.training.corpus import read_corpus

HEAD = "registry,split,name,version,licence\n"
TABLE = HEAD + "pypi,train,alpha,1.0,MIT\npypi,train,beta,2.1,BSD-3-Clause\npypi,validation,gamma,0.3,MIT\n"
NOTICE = "# Copyright someone.\n# Licensed under the terms of some licence, which are these.\n\n"


def code(word, lines=30):
    return "".join(f"def {word}_{i}(x):\n    return x + {i * 7919 % 1000} * {i**3}  # {word}\n\n" for i in range(lines))


def wheel(folder, name, version, files):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as out:
        for place, text in files.items():
            out.writestr(place, text)
        out.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: Our own\n")
        out.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def table(tmp_path):
    """Three packages, downloaded before, so that no client is needed."""
    have = tmp_path / "have" / "pypi"
    shared, own = code("shared"), NOTICE + code("own")
    wheel(have / "alpha-1.0", "alpha", "1.0", {"alpha/z.py": own, "alpha/a.py": code("a"), "alpha/same.py": shared})
    wheel(
        have / "beta-2.1", "beta", "2.1", {"beta/b.py": NOTICE + code("b"), "beta/c.py": own, "beta/x.so": "\0" * 500}
    )
    wheel(have / "gamma-0.3", "gamma", "0.3", {"gamma/g.py": shared, "gamma/d/e.py": code("e")})
    (tmp_path / "table.csv").write_text(TABLE)
    return tmp_path / "table.csv"


def run(table, **options):
    folder = table.parent
    arguments = {"out": folder / "corpus", "downloads": folder / "have", "table": table, **options}
    building.build(CorpusArguments(**arguments))
    return arguments["out"]


def contents(out):
    with (out / CONTENTS).open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_files_of_a_package_are_one_document_and_no_text_is_in_the_corpus_twice(table):
    out = run(table)
    texts = {str(file.relative_to(out)): file.read_text() for file in out.rglob("*.txt")}
    assert set(texts) == {"train/alpha.txt", "train/beta.txt", "validation/gamma.txt"}
    assert (
        texts["validation/gamma.txt"]
        == f"# gamma/d/e.py\n{code('e').rstrip()}\n\n# gamma/g.py\n{code('shared').rstrip()}\n\n"
    )
    assert (
        texts["train/alpha.txt"]
        == f"# alpha/a.py\n{code('a').rstrip()}\n\n# alpha/z.py\n{NOTICE}{code('own').rstrip()}\n\n"
    )
    assert texts["train/beta.txt"] == f"# beta/b.py\n{code('b').rstrip()}\n\n"  # the same notice is not repeated
    lines = contents(out)
    assert {name: (line["files"], line["duplicates"]) for name, line in lines.items()} == {
        "alpha": ("2", "1"), "beta": ("1", "1"), "gamma": ("2", "0")}  # fmt: skip
    assert int(lines["alpha"]["bytes"]) == len(texts["train/alpha.txt"])
    assert (lines["beta"]["licence"], lines["beta"]["licence_in_package"]) == ("BSD-3-Clause", "Our own")


def test_training_and_evaluation_see_the_same_split(table):
    corpus = read_corpus(str(run(table)), 10**6)
    assert sorted(document.name for document in corpus.train) == ["train/alpha.txt", "train/beta.txt"]
    assert [document.name for document in corpus.validation] == ["validation/gamma.txt"]
    (table.parent / "corpus" / "validation" / "gamma.txt").unlink()
    with pytest.raises(ValueError, match="its folder validation holds no files"):
        read_corpus(str(table.parent / "corpus"), 10**6)


def test_of_a_split_folder_no_document_is_most_of_what_is_taken(tmp_path):
    for place in ("train", "validation"):
        (tmp_path / place).mkdir()
        for i in range(12):
            (tmp_path / place / f"{i}.txt").write_text(f"line {i}\n" * 10_000)
    corpus = read_corpus(str(tmp_path), 80_000)
    assert {len(document.text) for document in corpus.train} == {10_000}
    assert {len(document.text) for document in corpus.validation} == {1_000}
    assert (len(corpus.train), len(corpus.validation)) == (8, 8)
    judged = held_out_texts(f"{tmp_path}#held-out")
    assert set(judged) == {file.read_text() for file in (tmp_path / "validation").iterdir()}


def test_the_same_packages_give_the_same_corpus_to_the_byte(table):
    one, two = run(table), run(table, out=table.parent / "again")
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert len(files) == 4


def test_a_large_package_is_cut_between_files_and_a_huge_one_thinned_evenly(table, monkeypatch):
    files = {f"alpha/{i:02}.py": code(f"w{i}") for i in range(40)}
    size = len(files["alpha/00.py"])
    wheel(table.parent / "have" / "pypi" / "alpha-1.0", "alpha", "1.0", files)
    monkeypatch.setattr(building, "DOCUMENT_BYTES", 5 * size)
    out = run(table)
    parts = [file.read_text() for file in sorted((out / "train").glob("alpha-*.txt"))]
    assert len(parts) == 8
    assert all(part.startswith("# alpha/") and 4 <= part.count("# alpha/") <= 6 for part in parts)
    assert "".join(parts).count("# alpha/") == 40
    monkeypatch.setitem(building.MOST_BYTES, "train", 20 * size)
    run(table, overwrite=True)
    assert [file.read_text() for file in sorted((out / "train").glob("alpha-*.txt"))] == parts[::2]


def test_what_is_there_is_left_alone_and_what_is_no_corpus_is_refused(table, capsys):
    out = run(table)
    (out / "train" / "alpha.txt").write_text("mine")
    run(table)
    assert (out / "train" / "alpha.txt").read_text() == "mine"
    assert "holds a corpus already" in capsys.readouterr().err
    run(table, overwrite=True)
    assert (out / "train" / "alpha.txt").read_text() != "mine"
    other = table.parent / "other"
    other.mkdir()
    assert main(["corpus", "--out", str(other), "--table", str(table), "--overwrite"]) == 2
    assert "exists and is no corpus (it has no CONTENTS.csv)" in capsys.readouterr().err
    assert other.is_dir()


def test_a_stopped_run_leaves_no_half_corpus_and_goes_on(table, monkeypatch):
    write = building._write
    monkeypatch.setattr(
        building, "_write", lambda package, *rest: stop() if package.name == "beta" else write(package, *rest)
    )

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(table)
    assert not (table.parent / "corpus").exists()
    monkeypatch.setattr(building, "_write", write)
    assert len(contents(run(table))) == 3


def test_a_broken_package_is_one_line(table):
    (table.parent / "have" / "pypi" / "beta-2.1" / "beta-2.1-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.raises(ValueError, match=r"beta-2.1-py3-none-any.whl is broken \(File is not a zip file\); remove it"):
        run(table)


def test_pip_brings_wheels_and_runs_nothing_of_a_package(tmp_path, monkeypatch):
    index, trace = tmp_path / "index", tmp_path / "trace"
    wheel(index, "alpha", "1.0", {"alpha/a.py": code("a")})
    with tarfile.open(index / "delta-1.0.tar.gz", "w:gz") as out:
        script = f"open({str(trace)!r}, 'w')\n".encode()
        entry = tarfile.TarInfo("delta-1.0/setup.py")
        entry.size = len(script)
        out.addfile(entry, BytesIO(script))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    alpha = Package("pypi", "train", "alpha", "1.0", "MIT")
    assert downloaded(alpha, tmp_path / "have") is None
    file = download(alpha, tmp_path / "have")
    assert file.read_bytes() == (index / file.name).read_bytes()
    shutil.rmtree(index / file.name, ignore_errors=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert download(alpha, tmp_path / "have") == file  # not asked for again
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(ValueError, match=r"^pypi's delta==1.0 could not be downloaded; .* No matching distribution"):
        download(Package("pypi", "train", "delta", "1.0", "MIT"), tmp_path / "have")
    assert not trace.exists()
    assert [path.name for path in (tmp_path / "have").iterdir()] == ["pypi"]  # nothing half done is left


def test_missing_packages_are_named_together_and_can_be_gone_without(table, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    table.write_text(TABLE + "pypi,train,absent,1.0,MIT\n")
    with pytest.raises(
        ValueError, match="1 of 4 packages could not be downloaded: absent; run again, or go on without"
    ):
        run(table)
    assert not (table.parent / "corpus").exists()
    assert set(contents(run(table, skip_missing=True))) == {"alpha", "beta", "gamma"}


def test_without_debians_tools_its_packages_are_left_out_with_a_line(table, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    table.write_text(TABLE + "debian,train,some-doc,,GPL-2.0-only\n")
    assert set(contents(run(table))) == {"alpha", "beta", "gamma"}
    assert "packages of Debian are left out: this system has no apt-get and no dpkg-deb" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_read_with_the_archives_inside_it(table, tmp_path):
    tree, place = tmp_path / "tree", tmp_path / "have" / "debian" / "some-source"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: some-source\nVersion: 3-1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    )
    (tree / "usr/share/doc/some-source").mkdir(parents=True)
    (tree / "usr/share/doc/some-source/copyright").write_text("License: GPL-2\n\nLicense: MIT\n")
    inside = tmp_path / "main.c"
    inside.write_text(code("inside").replace("#", "//"))
    with tarfile.open(tree / "usr/share/doc/some-source/src.tar.xz", "w:xz") as out:
        out.add(inside, "src/main.c")
    place.mkdir(parents=True)
    subprocess.run(
        ["dpkg-deb", "--build", str(tree), str(place / "some-source_3-1_all.deb")], check=True, capture_output=True
    )
    table.write_text(TABLE + "debian,train,some-source,,GPL-2.0-only\n")
    out = run(table)
    assert (out / "train/some-source.txt").read_text() == f"# src/main.c\n{inside.read_text().rstrip()}\n\n"
    line = contents(out)["some-source"]
    assert (line["version"], line["licence_in_package"], line["files"]) == ("3-1", "GPL-2; MIT", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\n", "expected the first line registry,split,name,version,licence"),
        (HEAD + "pypi,train,alpha,1.0\n", "line 2: expected 5 columns, got 4"),
        (HEAD + "npm,train,alpha,1.0,MIT\n", "line 2: expected pypi or debian"),
        (HEAD + "pypi,train,alpha,,MIT\n", "line 2: alpha should have a version if, and only if, it is of pypi"),
        (TABLE + "pypi,train,alpha,1.1,MIT\n", "alpha named more than once"),
        (HEAD + "pypi,train,alpha,1.0,MIT\n", "expected packages for train and for validation"),
    ],
)
def test_a_faulty_table_is_one_line(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(tmp_path / "table.csv")
    assert "\n" not in str(caught.value)


def test_the_librarys_own_table_pins_its_packages_and_names_what_is_held_out():
    packages = read_table(OWN_TABLE)
    held_out = {package.name for package in packages if package.split == "validation"}
    assert held_out == {
        "networkx", "scrapy", "sphinx", "celery", "twisted", "buildbot", "biopython", "wagtail",
        "binutils-source", "debian-handbook",
    }  # fmt: skip
    assert sum(package.registry == "pypi" and package.split == "train" for package in packages) > 100
