"""The wheel in an environment of its own: commands from a folder beside another package configs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from semiseg_jax import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What a distribution is made of.
SOURCES = ("semiseg_jax", "configs", "docs", "launch", "tests")
MINE = """
from configs import streets

def get_config():
    config = streets.get_config()
    config.data.streets_train = 20
    return config
"""
# Ends the process when a module or a file of the repository is opened.
GUARD = """
import os, sys

def refuse(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith({root!r}) and not path.startswith({environment!r}):
            os.write(2, f"FILE OF THE REPOSITORY: {{path}}".encode())
            os._exit(99)

sys.addaudithook(refuse)
"""


def run(*command, cwd, check=True):
    """Runs a command without the variables of the tests, on one device."""
    own = ("PYTHON", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    process = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0 or not check, process.stdout + process.stderr
    return process


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the source distribution, as an index would serve both."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    requirement = "setuptools>=77.0.3,<90"
    assert requirement in (ROOT / "pyproject.toml").read_text()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--target", folder / "tools", requirement, cwd=folder)
    (copy / "dist").mkdir()
    path = f"import sys; sys.path.insert(0, {str(folder / 'tools')!r})"
    run(sys.executable, "-c", f"{path}; {build}", cwd=copy)
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_has_the_files_of_the_package_and_no_others(wheel):
    installed = {"configs": "semiseg_jax/shipped_configs", "semiseg_jax": "semiseg_jax"}
    expected = {
        f"{name}/{path.relative_to(ROOT / top).as_posix()}"
        for top, name in installed.items()
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("LICENSE") for name in names)


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel, and with the packages of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where, cwd=folder).stdout.strip())
    environment = sysconfig.get_path("purelib")
    (packages / "packages.pth").write_text(f"{environment}\nimport guard_of_tests\n")
    (packages / "guard_of_tests.py").write_text(
        GUARD.format(root=f"{ROOT}{os.sep}", environment=f"{ROOT}{os.sep}.venv{os.sep}")
    )
    return python


@pytest.fixture
def folder(tmp_path):
    """A working folder beside another package called configs, inside a repository of the user."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").write_text("")
    (tmp_path / "configs/default.py").write_text("raise ValueError('another package')")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.py").write_text(MINE)
    return tmp_path


def test_the_guard_ends_a_process(python, folder):
    """Guards the other tests: they would notice a file of the repository."""
    command = f"open({str(ROOT / 'README.md')!r})"
    assert run(python, "-c", command, cwd=folder, check=False).returncode == 99


def test_modules_come_from_the_environment(python, folder):
    command = (
        "import semiseg_jax; from semiseg_jax.runtime import config_files; "
        "from semiseg_jax import workdir; import json; "
        "print(json.dumps([semiseg_jax.__file__, str(config_files.shipped_folder()), "
        "config_files.load('camvid:half').data.labeled_list, workdir.code_version()]))"
    )
    module, configs, labeled, version = json.loads(run(python, "-c", command, cwd=folder).stdout)
    assert Path(module).is_relative_to(python.parents[1])
    assert Path(configs).is_relative_to(python.parents[1])
    assert (labeled, version) == ("configs/splits/camvid/1_30.txt", __version__)


def test_commands_find_shipped_files_from_any_folder(python, folder):
    check = (python, "-m", "semiseg_jax.data.splits")
    lists = run(*check, "--labeled=configs/splits/camvid/1_30.txt", cwd=folder).stdout
    assert "The labelled images are those of CamVid 1/30" in lists
    scenes = ("--config=configs/streets.py", "--config.data.streets_train=20")
    assert "pavement" in run(*check, *scenes, "--config.data.labels=4", cwd=folder).stdout


def test_a_missing_config_is_one_sentence(python, folder):
    command = (python, "-m", "semiseg_jax.main", "--config=configs/mine.py")
    error = run(*command, cwd=folder, check=False).stderr
    assert error.startswith("Error: The config configs/mine.py is missing") and "camvid" in error


def test_own_configs_start_from_the_shipped_ones(python, folder):
    arguments = ("--config=own/mine.py", "--config.model.norm=none")
    command = (python, "-m", "semiseg_jax.main", *arguments)
    assert "Error: model.norm is 'none'" in run(*command, cwd=folder, check=False).stderr


def test_the_report_finds_its_templates_and_defaults(python, folder):
    """Without a run, whose training would take minutes."""
    command = (
        "import jinja2; from semiseg_jax.reporting import page; "
        "from semiseg_jax.runtime import config_files; "
        "loader = jinja2.FileSystemLoader(page._TEMPLATES); "
        "print(loader.list_templates(), config_files.default_config().data.name)"
    )
    assert run(python, "-c", command, cwd=folder).stdout == "['report.css', 'report.html'] folder\n"
