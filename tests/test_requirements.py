"""requirements.lock pins one version of every package for every system, and these versions are installed here."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
SYSTEMS = {
    "Linux": LINUX,
    "Linux on ARM": LINUX | {"platform_machine": "aarch64"},
    "macOS": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    "Windows": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"},
}


def read(file: Path) -> Iterator[Requirement]:
    """The requirements in a file and in the files that it includes."""
    for line in file.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            yield from read(file.parent / line.removeprefix("-r "))
        elif line:
            yield Requirement(line)


def for_system(requirements: Iterator[Requirement], system: dict[str, str]) -> dict[str, list[Requirement]]:
    """{name of a package: its requirements} of those whose markers apply to a system."""
    found: dict[str, list[Requirement]] = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate(system):
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def pinned(locked: list[Requirement]) -> Version:
    """The version in the only line of the lock file about a package."""
    (line,) = locked
    (specifier,) = line.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_lock_has_one_version_of_every_direct_requirement(system, python):
    here = SYSTEMS[system] | {"python_version": python, "python_full_version": f"{python}.1"}
    lock = for_system(read(ROOT / "requirements.lock"), here)
    for name, requirements in for_system(read(ROOT / "requirements-test.txt"), here).items():
        version = pinned(lock[name])
        assert all(version in requirement.specifier for requirement in requirements), f"{name} {version}"


def installed(requirements: list[Requirement]) -> dict[str, Version]:
    """{name: version} of the installed packages that meet `requirements`, and of all that these require in turn."""
    found: dict[str, Version] = {}
    todo, seen = [(requirement, "") for requirement in requirements], set()
    while todo:
        requirement, extra = todo.pop()
        if (str(requirement), extra) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add((str(requirement), extra))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError as error:
            raise AssertionError(f"{requirement} is not installed: bash scripts/test.sh installs it") from error
        todo += [(Requirement(child), extra) for child in package.requires or () for extra in ("", *requirement.extras)]
        found[canonicalize_name(requirement.name)] = Version(package.version)
    return found


def test_what_is_installed_is_what_the_lock_says():
    lock = for_system(read(ROOT / "requirements.lock"), {})
    here = installed(list(read(ROOT / "requirements-test.txt")))
    assert len(here) > 100
    differs = {name: str(version) for name, version in here.items() if Version(version.public) != pinned(lock[name])}
    assert not differs, "bash scripts/test.sh installs what requirements.lock says"
