"""requirements.lock: one version of everything, for every system, and it is what is installed here."""

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
    """The requirements of a file and of those that it includes."""
    for line in file.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            yield from read(file.parent / line.removeprefix("-r "))
        elif line:
            yield Requirement(line)


def for_system(requirements: Iterator[Requirement], system: dict[str, str]) -> dict[str, list[Requirement]]:
    """{name: what is asked of it} under the markers of one system."""
    found: dict[str, list[Requirement]] = {}
    for one in requirements:
        if one.marker is None or one.marker.evaluate(system):
            found.setdefault(canonicalize_name(one.name), []).append(one)
    return found


def pinned(locked: list[Requirement]) -> Version:
    """The version of the only line of a package."""
    (line,) = locked
    (specifier,) = line.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_lock_has_one_version_of_every_direct_requirement(system, python):
    here = SYSTEMS[system] | {"python_version": python, "python_full_version": f"{python}.1"}
    lock = for_system(read(ROOT / "requirements.lock"), here)
    for name, wanted in for_system(read(ROOT / "requirements-test.txt"), here).items():
        version = pinned(lock[name])
        assert all(version in one.specifier for one in wanted), f"{name} {version}"


def installed(requirements: list[Requirement]) -> dict[str, Version]:
    """What these bring with them on this machine, directly or not."""
    found: dict[str, Version] = {}
    todo, seen = [(one, "") for one in requirements], set()
    while todo:
        one, extra = todo.pop()
        if (str(one), extra) in seen or (one.marker and not one.marker.evaluate({"extra": extra})):
            continue
        seen.add((str(one), extra))
        try:
            package = distribution(one.name)
        except PackageNotFoundError as error:
            raise AssertionError(f"{one} is not installed: bash scripts/test.sh installs it") from error
        todo += [(Requirement(child), extra) for child in package.requires or () for extra in ("", *one.extras)]
        found[canonicalize_name(one.name)] = Version(package.version)
    return found


def test_what_is_installed_is_what_the_lock_says():
    lock = for_system(read(ROOT / "requirements.lock"), {})
    here = installed(list(read(ROOT / "requirements-test.txt")))
    assert len(here) > 100
    differs = {name: str(version) for name, version in here.items() if Version(version.public) != pinned(lock[name])}
    assert not differs, "bash scripts/test.sh installs what requirements.lock says"
