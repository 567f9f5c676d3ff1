"""What an installation has: requirements, packages, files, and the version in all places."""

import re
import tomllib
from pathlib import Path

import pytest

import semiseg_jax

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def requirements(name):
    """Returns the lines of a requirements file, without comments, and the files it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    included = [line.removeprefix("-r").strip() for line in lines if line.startswith("-r")]
    return [line for line in lines if line and not line.startswith("-")], included


def test_dependencies_are_read_from_the_requirements():
    assert "dependencies" in PROJECT["dynamic"] and "dependencies" not in PROJECT
    assert SETUPTOOLS["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    own, included = requirements("requirements.txt")
    assert own and not included, "setuptools reads no file that includes others"


@pytest.mark.parametrize("extra", ["gpu", "tpu"])
def test_extras_are_those_of_the_requirements(extra):
    own, included = requirements(f"requirements-{extra}.txt")
    assert PROJECT["optional-dependencies"][extra] == own
    assert included == ["requirements.txt"]


def test_there_are_no_other_extras():
    files = {path.stem.partition("-")[2] for path in ROOT.glob("requirements-*.txt")}
    assert set(PROJECT["optional-dependencies"]) == files - {"dev"}


def test_versions_of_a_requirement_agree_in_all_files():
    pins = {}
    for path in sorted(ROOT.glob("requirements*.txt")):
        for line in requirements(path.name)[0]:
            name, version = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?\s*([^;]*)(?:;.*)?", line).groups()
            pins.setdefault(name.lower().replace("_", "-"), set()).add(version.strip())
    assert len(pins) > 20
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}


def test_all_packages_are_installed():
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("semiseg_jax", "configs")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert SETUPTOOLS["package-dir"] == {"semiseg_jax.shipped_configs": "configs"}
    installed_as = {re.sub(r"^configs\b", "semiseg_jax.shipped_configs", p) for p in packages}
    assert set(SETUPTOOLS["packages"]) == installed_as


def test_all_files_that_are_no_modules_are_installed():
    listed = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            matched = set(folder.glob(pattern))
            assert matched, f"{package}: {pattern}"
            listed |= matched
    there = {
        path
        for top in ("semiseg_jax", "configs")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert listed == there


def test_python_versions_agree():
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert named == {"3.11", "3.12", "3.13"}
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


def test_the_version_is_that_of_citation_and_changelog():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [semiseg_jax.__version__]
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" and headings[1] == semiseg_jax.__version__
