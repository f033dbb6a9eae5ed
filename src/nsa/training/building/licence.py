"""What a package says of itself: its version, and its licence."""

import re
import subprocess
from email.parser import BytesParser
from pathlib import Path

from nsa.training.building.members import Member
from nsa.training.building.table import Package

LONGEST = 120
CLASSIFIER = "License :: OSI Approved :: "


class Licence:
    """`found` is the licence that the package's metadata names, once `look_at` has seen the package's files."""

    def __init__(self, package: Package) -> None:
        self.package, self.found = package, ""

    def look_at(self, member: Member) -> None:
        if self.package.registry == "pypi":
            if not self.found and re.fullmatch(r"[^/]+\.dist-info/METADATA", member.path):
                self.found = _of_wheel(member.read())
        elif member.path == f"usr/share/doc/{self.package.name}/copyright":
            self.found = _of_debian(member.read())

    def version(self, archive: Path) -> str:
        if self.package.registry == "pypi":
            return self.package.version
        asked = ["dpkg-deb", "--field", str(archive), "Version"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def _of_wheel(metadata: bytes) -> str:
    fields = BytesParser().parsebytes(metadata, headersonly=True)
    classifiers = [value for value in fields.get_all("Classifier", []) if value.startswith(CLASSIFIER)]
    said = [
        fields.get("License-Expression"),
        "; ".join(value.removeprefix(CLASSIFIER) for value in classifiers),
        fields.get("License"),  # last, for it may hold a licence's whole text
    ]
    return _short(next(filter(None, said), ""))


def _of_debian(copyright_file: bytes) -> str:
    names = re.findall(r"^License: *(\S.*)$", copyright_file.decode("utf-8", errors="replace"), re.MULTILINE)
    return _short("; ".join(dict.fromkeys(name.strip() for name in names)))


def _short(text: str) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
