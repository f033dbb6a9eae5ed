"""What of a package is text that someone wrote."""

import random

import pytest

from nsa.training.building.editions import other_editions
from nsa.training.building.text import Notices, is_candidate, text_of

WRITTEN = "".join(f"line {i} of {i * i} things, {'abcdefgh'[i % 7 :]}\n" for i in range(60))


@pytest.mark.parametrize(
    ("path", "size", "wanted"),
    [
        ("a/b.py", 5000, True),
        ("a/B.C", 5000, True),
        ("usr/share/man/man7/unicode.7", 5000, True),
        ("a/b.so", 5000, False),
        ("a/b.py", 100, False),
        ("a/b.py", 10**7, False),
        ("a/locale/de/x.py", 5000, False),
        ("a-1.0.dist-info/top_level.txt", 5000, False),
        ("a/.git/x.py", 5000, False),
        ("a/jquery.min.js", 5000, False),
        ("a/LICENSE.txt", 5000, False),
        ("usr/share/doc/a/changelog.txt", 5000, False),
    ],
)
def test_files_are_chosen_by_name_and_size(path, size, wanted):
    assert is_candidate(path, size) == wanted


def test_text_is_kept_but_for_spaces_at_ends_of_lines():
    assert text_of("a.py", WRITTEN.replace("\n", "  \r\n").encode() + b"\n\n") == WRITTEN


@pytest.mark.parametrize(
    "content",
    [
        b"\xe9\xff" + WRITTEN.encode(),
        WRITTEN.encode() + b"\0",
        WRITTEN.encode() + b"x" * 3000,
        b"0x00, 0x01, 0x02,\n" * 1000,
        " ".join(random.Random(0).choices("abcdefghij", k=2000)).encode(),
        b"\n" * 500,
    ],
    ids=["latin", "binary", "a long line", "repetition", "no lines", "empty"],
)
def test_what_no_one_wrote_is_left_out(content):
    assert text_of("a.py", content) is None


def test_html_gives_what_a_browser_shows():
    page = (
        "<html><head><title>no</title><style>p {}</style></head><body><nav>no</nav><h1>A  title</h1>"
        f"<p>Less &lt; more,\n <b>bold</b>.</p><pre>  kept\n    as it is\n{WRITTEN}</pre>"
        "<script>no()</script></body></html>"
    )
    text = text_of("a.html", page.encode())
    assert text == f"A title\n\nLess < more, bold.\n\n  kept\n    as it is\n{WRITTEN}"


def test_a_notice_of_copyright_is_kept_once():
    notices = Notices()
    one, two = "# Copyright x\n# Licence y\n\n", "# another licence\n\n"
    assert notices.without(one + "import a\n\nb\n") == one + "import a\n\nb\n"
    assert notices.without(one + "import c\n\nd\n") == "import c\n\nd\n"
    assert notices.without(two + "e\n\nf\n") == two + "e\n\nf\n"
    assert notices.without(one + two + "g\n\nh\n") == "g\n\nh\n"
    assert notices.without("import a\n\nb\n") == "import a\n\nb\n"


def test_translations_and_pages_whose_sources_are_there_are_other_editions():
    kept = ["doc/en/a.html", "d/en-US/a.html", "h/_sources/lib/os.rst.txt", "h/lib/re.html", "x/de/alone.py"]
    kept += ["Documentation/hwmon/chip.rst", "doc/en/io/b.html", "doc/api/a.html", "policy/_sources/ch-one.rst.txt"]
    others = ["doc/de/a.html", "doc/pt_BR/a.html", "d/de-DE/a.html", "h/lib/os.html", "html/hwmon/chip.html"]
    others += ["policy/ch-one.html"]
    assert other_editions([*kept, *others]) == set(others)
