"""Install what ``make wheel`` made into clean environments, and use it: ``make release-check``.

Each environment has a Python of this machine, a torch, and the wheel or the package that the source
archive builds in isolation. The source archive's own tests run in the first of them. Exit status 1
at the first thing that fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py")
# They need neither a compiler nor a data set, and use the helpers of other tests.
TESTS = ("tests/test_fast.py", "tests/bases/test_basis.py", "tests/backends/test_native.py")
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
TORCHES = ("2.10.0", "2.13.0", "")


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command outside of the project, so that only what is installed is imported."""
    print("$", *command, flush=True)
    hidden = ("PYTHONPATH", "CXX", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run([str(word) for word in command], cwd=cwd, env=environment, check=True)


def install(folder: Path, *what: str | Path) -> None:
    """Install into an environment."""
    pip = folder / "bin/pip"
    run(pip, "install", "--quiet", "--disable-pip-version-check", *what, cwd=folder)


def environment(python: str, torch: str, folder: Path) -> Path | None:
    """A new environment with torch; None where the registry has none for this Python."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    try:
        install(folder, f"torch=={torch}" if torch else "torch")
    except subprocess.CalledProcessError:
        return None
    return folder


def check(folder: Path, package: Path) -> None:
    """Install the package into an environment and use it."""
    run(folder / "bin/pip", "uninstall", "--quiet", "--yes", "wavprune", cwd=folder)
    install(folder, f"{package}[checkpoint]")
    run(folder / "bin/python", SMOKE, cwd=folder)


def test_archive(folder: Path, archive: Path) -> None:
    """Run tests from the unpacked source archive, on the installed package."""
    install(folder, "pytest", "hypothesis")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    python = folder / "bin/python"
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, cwd=unpacked)


def runs(python: str) -> bool:
    """Whether a command is a Python that starts; version managers leave stubs of others."""
    command = [python, "-c", ""]
    return shutil.which(python) is not None and not subprocess.run(command, check=False).returncode


def main() -> int:
    """Check all environments that can be had here; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="the folder with the wheel and the archive")
    parser.add_argument("--pythons", nargs="*", default=PYTHONS)
    parser.add_argument("--torches", nargs="*", default=TORCHES)
    options = parser.parse_args()
    (wheel,) = options.dist.resolve().glob("*.whl")
    (archive,) = options.dist.resolve().glob("*.tar.gz")
    pythons = [python for python in options.pythons if runs(python)]
    checked: list[str] = []
    for i, python in enumerate(pythons):
        # Every torch with the first Python, and the newest with the others.
        for torch in options.torches if i == 0 else options.torches[-1:]:
            with tempfile.TemporaryDirectory() as directory:
                folder = environment(python, torch, Path(directory) / "env")
                name = f"{python}, torch {torch or 'newest'}"
                if folder is None:
                    print(f"release-check: skipped {name}: the registry does not have it")
                    continue
                check(folder, wheel)
                if not checked:
                    test_archive(folder, archive)
                    check(folder, archive)
                checked.append(name)
    print(f"release-check: {wheel.name} works with {'; '.join(checked)}")
    return 0 if checked else 1


if __name__ == "__main__":
    sys.exit(main())
