"""The commit in records of runs: that of this project, never of a repository around it."""

import os
import subprocess

import pytest

from semiseg_jax import __version__, workdir
from semiseg_jax.runtime import config_files


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository of a user, with the package inside an untracked environment."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    package = tmp_path / "env" / "semiseg_jax"
    package.mkdir(parents=True)
    file = package / "workdir.py"
    file.touch()
    (tmp_path / "own.py").touch()
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "own.py")
    git(tmp_path, "commit", "--quiet", "--message=one")
    monkeypatch.setattr(workdir, "__file__", str(file))
    return tmp_path


def git(folder, *arguments):
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def version():
    return workdir.code_version.__wrapped__()


def test_the_commit_of_a_repository_around_the_package_is_not_reported(repository):
    assert version() == __version__


def test_the_commit_of_the_package_is_reported(repository, monkeypatch):
    git(repository, "add", "env")
    git(repository, "commit", "--quiet", "--message=two")
    commit = git(repository, "rev-parse", "--short=12", "HEAD")
    assert version() == f"{__version__}+{commit}"
    # As in a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(repository / "none"))
    assert version() == f"{__version__}+{commit}"


def test_an_installed_package_has_no_commit(repository, monkeypatch, tmp_path):
    git(repository, "add", "env")
    git(repository, "commit", "--quiet", "--message=environment")
    monkeypatch.setattr(config_files, "_INSTALLED", tmp_path)
    assert version() == __version__


def test_without_git(monkeypatch, repository):
    monkeypatch.setenv("PATH", "/nowhere")
    assert version() == __version__
