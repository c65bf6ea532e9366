"""The lock names one version of everything that the package and its tests need, on every Python that we support."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PYTHONS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python :: 3.")]


def pins(environment: dict[str, str]) -> dict[str, list[str]]:
    """Package -> the versions that the lock allows in this environment."""
    found: dict[str, list[str]] = {}
    for pin in LOCK:
        if pin.marker is None or pin.marker.evaluate(environment):
            assert [clause.operator for clause in pin.specifier] == ["=="], pin
            found.setdefault(canonicalize_name(pin.name), []).extend(clause.version for clause in pin.specifier)
    return found


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_one_version_within_the_range_of_every_requirement(python, system):
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
    }
    pinned = pins(environment)
    assert all(len(versions) == 1 for versions in pinned.values())
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        wanted = Requirement(text)
        (version,) = pinned[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), f"{text}: run tools/lock.sh"


def needed(requirement: Requirement, seen: set[tuple[str, frozenset[str]]]) -> None:
    """Add to ``seen`` what this installed requirement needs, and so on down."""
    key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
    if key in seen:
        return
    seen.add(key)
    try:
        below = requires(requirement.name) or []
    except PackageNotFoundError:  # an incomplete environment; the gate's is complete
        return
    for text in below:
        child = Requirement(text)
        extras = requirement.extras or {""}
        if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
            needed(child, seen)


def test_everything_that_is_installed_for_us_is_in_the_lock():
    seen: set[tuple[str, frozenset[str]]] = set()
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
        needed(Requirement(text), seen)
    names = {name for name, _ in seen}
    assert {"torch", "sympy", "mpmath"} <= names  # torch's own needs, and theirs
    assert sorted(names - set(pins(dict(default_environment())))) == []
