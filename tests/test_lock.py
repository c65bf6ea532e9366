"""The lock names one version of everything that the package and its tests need, on every Python that we support."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


# package -> the first version without the hole named beside it, of the holes known when this was written: where no
# vulnerability service can be asked, nothing in the lock or in a range of ours goes back behind them
SAFE_FROM = {
    "aiohttp": ("3.13.3", "CVE-2025-69223"),
    "filelock": ("3.20.3", "CVE-2026-22701"),
    "fonttools": ("4.60.2", "CVE-2025-66034"),
    "h11": ("0.16.0", "CVE-2025-43859"),
    "idna": ("3.7", "CVE-2024-3651"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "pillow": ("11.3.0", "CVE-2025-48379"),
    "protobuf": ("6.31.1", "CVE-2025-4565"),
    "pyarrow": ("14.0.1", "CVE-2023-47248"),
    "requests": ("2.32.4", "CVE-2024-47081"),
    "setuptools": ("78.1.1", "CVE-2025-47273"),
    "torch": ("2.6.0", "CVE-2025-32434"),  # `torch.load(weights_only=True)` could execute code
    "tqdm": ("4.66.3", "CVE-2024-34062"),
    "transformers": ("4.53.0", "CVE-2025-6921"),
    "urllib3": ("2.6.3", "CVE-2026-21441"),
    "werkzeug": ("3.1.4", "CVE-2025-66221"),
}


def test_nothing_in_the_lock_has_a_hole_that_was_known():
    pinned = {canonicalize_name(pin.name): pin for pin in LOCK}
    for name in SAFE_FROM:
        assert name in pinned, f"{name} is not in the lock any more: take it out of the table"
    behind = [
        f"{pin} ({SAFE_FROM[name][1]})"
        for pin in LOCK
        if (name := canonicalize_name(pin.name)) in SAFE_FROM
        and any(Version(clause.version) < Version(SAFE_FROM[name][0]) for clause in pin.specifier)
    ]
    assert behind == []


def test_no_range_of_ours_goes_back_behind_a_hole_in_reading_files():
    """What reads files of others must be safe in its oldest version too."""
    oldest = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for name in ("torch", "jinja2"):
        (lowest,) = [clause.version for clause in oldest[name] if clause.operator == ">="]
        assert Version(lowest) >= Version(SAFE_FROM[name][0]), f"{name}: {SAFE_FROM[name][1]}"
    assert not oldest["lightning"].contains("2.6.2")
    assert not oldest["lightning"].contains("2.6.3")
