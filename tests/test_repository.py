"""The repository itself: small files, links that lead somewhere, results that stay as they landed."""

import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MOST_BYTES = 100_000
UNEDITED_FROM = "2026-12-01"  # before it, charts of other days were drawn again with letters as text


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


@lru_cache
def pages() -> list[Path]:
    return [ROOT / name for name in git("ls-files", "*.md")]


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings: lower case, punctuation gone, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_tracked_file_is_large():
    sizes = {name: (ROOT / name).stat().st_size for name in git("ls-files") if (ROOT / name).is_file()}
    large = {name: size for name, size in sizes.items() if size > MOST_BYTES}
    assert not large, f"more than {MOST_BYTES:,} bytes: {large}"


def test_links_of_the_documents_lead_somewhere():
    wrong = []
    for page in pages():
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            there = page if not path else page.parent / path
            if "://" in target or target.startswith("mailto:"):
                continue
            if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong


def test_files_that_the_documents_name_are_there():
    """In backticks: paths from the root, and results by their bare names."""
    wrong = []
    for page in pages():
        if page.name in ("log.md", "CHANGELOG.md"):  # which tell of what was there
            continue
        for name in re.findall(r"`([\w./-]+\.(?:py|md|svg|json|toml))`", page.read_text(encoding="utf-8")):
            a_result = re.search(r"_\d{4}-\d\d-\d\d", name) and "/" not in name
            a_path = re.match(r"(src|tests|docs|benchmarks|examples)/[^A-Z]*$", name)
            if (a_result or a_path) and not ((RESULTS if a_result else ROOT) / name).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {name}")
    assert not wrong


def test_results_are_dated_and_their_charts_hold_letters_as_text():
    names = [Path(name) for name in git("ls-files", "benchmarks/results")]
    assert all(re.search(r"_\d{4}-\d\d-\d\d(_\d+)?$", name.stem) for name in names)
    assert all((RESULTS / f"{name.stem}.md").is_file() for name in names)  # the tables, with what made them
    for name in names:
        if name.suffix == ".svg":
            assert "<text" in (ROOT / name).read_text(encoding="utf-8"), name


def test_results_are_not_edited_after_they_landed():
    where = ("--diff-filter=M", "--name-only", "--", "benchmarks/results")
    committed = git("log", f"--since={UNEDITED_FROM}", "--format=", *where)
    assert not {*committed, *git("diff", "HEAD", *where)}


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by their bare names, and so it does what lies in tests/support."""
    names = [Path(name).name for name in git("ls-files", "tests/*.py") if not name.endswith("conftest.py")]
    assert not {name for name in names if names.count(name) > 1}
