"""How commands end: signals, missing platforms, closed outputs, paths in the home folder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from configs import default
from semiseg_jax import self_training
from semiseg_jax.runtime import cli, fileio, interrupts, multihost, paths
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.serving import exporters
from tests import mains, processes
from tests.errors import raises_code

SENTENCE = "Interrupted: start the same command again.\n"

# A command whose imports take as long as the test needs: {} is where it waits.
COMMAND = """
import sys
sys.argv[:1] = ["-m"]
import semiseg_jax
sys.argv[:1] = ["command"]
from semiseg_jax.runtime import interrupts, logger, preemption
import os, pathlib, time

def wait():
    os.write(1, b"ready")
    end = time.monotonic() + 60
    while time.monotonic() < end and not preemption.should_stop():
        time.sleep(0.01)
    logger.logger.info("goes on")
    preemption.raise_if_stopping()

{}
"""
IMPORTING = "wait()"
QUIET = "os.dup2(os.open(os.devnull, os.O_WRONLY), 2)\nwait()"
EXPORTING = """
with interrupts.exit_on_signals(), interrupts.scratch_folder("scratch"):
    pathlib.Path("scratch/file").write_text("")
    wait()
"""
RUNNING = """
try:
    with preemption.install_signal_handlers():
        wait()
except preemption.Preempted:
    os._exit(75)
"""


@contextlib.contextmanager
def started(phase, folder, *ignored, **options):
    """A process that waits in a phase of a command; signals are heard unless they are ignored."""
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            action = signal.SIG_IGN if number in ignored else signal.SIG_DFL
            before = signal.signal(number, action)
            stack.callback(signal.signal, number, before)
        options = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE} | options
        environment = os.environ | {"PYTHONPATH": str(processes.ROOT)}
        command = [sys.executable, "-c", COMMAND.format(phase)]
        process = subprocess.Popen(command, cwd=folder, env=environment, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("phase", "numbers", "status", "sentence"),
    [
        (IMPORTING, ["SIGINT"], 130, SENTENCE),
        (QUIET, ["SIGINT"], 130, SENTENCE),
        (EXPORTING, ["SIGINT"], 130, SENTENCE),
        (EXPORTING, ["SIGTERM"], 75, SENTENCE),
        (EXPORTING, ["SIGHUP"], 75, SENTENCE),
        (RUNNING, ["SIGHUP"], 75, "SIGHUP: stopping as soon as the current work is saved.\n"),
        # As from the shell and from the system, when a terminal is closed.
        (RUNNING, ["SIGHUP", "SIGHUP"], 75, "SIGHUP: stopping"),
        (RUNNING, ["SIGHUP", "SIGTERM"], 75, "SIGHUP: stopping"),
    ],
)
def test_a_signal_ends_a_command_without_a_traceback(tmp_path, phase, numbers, status, sentence):
    with started(phase, tmp_path) as process:
        assert process.stdout.read(5) == b"ready"
        for name in numbers:
            process.send_signal(signal.Signals[name])
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == status and errors.startswith(sentence), errors
    assert errors == sentence or len(numbers) > 1 or not sentence.endswith("\n")
    assert not list(tmp_path.iterdir())


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(tmp_path):
    with started(RUNNING, tmp_path, signal.SIGHUP) as process:
        assert process.stdout.read(5) == b"ready"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1].startswith(b"SIGTERM")
    assert process.returncode == 75


def test_a_closed_terminal_does_not_keep_a_run_from_saving(tmp_path):
    ours, theirs = os.openpty()
    with started(RUNNING, tmp_path, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        assert os.read(ours, 5) == b"ready"
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75


def test_a_closed_pipe_does_not_keep_a_run_from_saving(tmp_path):
    with started(RUNNING, tmp_path) as process:
        assert process.stdout.read(5) == b"ready"
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75


def test_an_export_removes_what_killed_ones_left(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    living = os.getppid()
    names = {
        f".out.0-{killed.pid}.tmp": True,
        f".out.0-{living}.tmp": False,
        f".other.0-{killed.pid}.tmp": False,
        ".out.mine": False,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    with exporters._atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
        assert folder.parent.name == f".out.0-{os.getpid()}.tmp"
    kept = {name for name, removed in names.items() if not removed}
    assert {p.name for p in tmp_path.iterdir()} == kept | {"out"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(ZeroDivisionError), exporters._atomic_folder(tmp_path / "new"):
        raise ZeroDivisionError
    assert {p.name for p in tmp_path.iterdir()} == kept | {"out"}


def test_temporary_names_are_found_again(tmp_path):
    assert fileio._TEMPORARY_NAME.fullmatch(os.path.basename(fileio.temporary_name(tmp_path)))
    assert interrupts.EXIT_STATUS == 130


# Paths


def text_keys():
    """The config keys whose value is text, by dotted name."""
    flat = default.get_config().to_dict()
    return {
        f"{section}.{key}"
        for section, keys in flat.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if isinstance(value, str)
    }


# The keys whose text is no path: a new key belongs here or into paths.PATH_KEYS.
NO_PATHS = re.compile(
    r"data\.(name|in_both_lists|image_suffix|mask_suffix|mask_channel|tfds_.*)|sda\.magnitude|loss\..*|pseudo\.average"
    r"|model\.(backbone|head|norm|first_dilation|position_rule|input_normalization|.*_dtype)"
    r"|eval\.(split|select)|rounds\.(student_model|student_init|keep)|optim\..*|method\..*"
)


def test_the_home_folder_is_known_in_every_path_of_the_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths_ = {key for key in text_keys() if not NO_PATHS.fullmatch(key)}
    assert paths_ == set(paths.PATH_KEYS)
    config = default.get_config()
    config.update_from_flattened_dict(dict.fromkeys(text_keys(), "~/x"))
    paths.expand_home_in_config(config)
    for key in text_keys():
        section, name = key.split(".")
        assert config[section][name] == ("/home/me/x" if key in paths_ else "~/x"), key


# Flags of commands that hold no path; all other text flags do.
NO_PATH_FLAGS = {"coordinator", "format", "precision", "size", "background"}


@pytest.mark.parametrize(
    "command",
    ["main", "predict", "export", "report", "ablations", "plan", "suggest", "data/convert"],
)
def test_the_home_folder_is_known_in_every_path_flag(command):
    source = (processes.ROOT / "semiseg_jax" / f"{command}.py").read_text()
    names = re.findall(r'DEFINE_string\(\s*"(\w+)"', source)
    assert set(names) <= NO_PATH_FLAGS


def test_the_home_folder_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for path, expanded in (
        ("~", "/home/me"),
        ("~/a b", "/home/me/a b"),
        ("~no such user/x", "~no such user/x"),
        ("a/~/b", "a/~/b"),
        ("", ""),
        ("gs://bucket/~", "gs://bucket/~"),
    ):
        assert paths.expand_home(path) == expanded
        assert cli._PathParser().parse(path) == expanded
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with raises_code("home-folder-unknown", "~/x"):
        paths.expand_home("~/x")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(paths.Path, "home", no_home)
    monkeypatch.delenv("SEMISEG_CACHE", raising=False)
    assert str(paths.default_cache_dir()).endswith(f"/semiseg_jax-{os.getuid()}")


@pytest.mark.parametrize("command", ["main", "predict"])
@pytest.mark.parametrize("kind", ["missing", "a folder", "no text", "empty name"])
def test_a_flagfile_that_cannot_be_read_is_one_sentence(tmp_path, command, kind):
    path = tmp_path / "flags"
    if kind == "a folder":
        path.mkdir()
    elif kind == "no text":
        path.write_bytes(b"\xff\xfe\x80")
    argument = "--flagfile=" if kind == "empty name" else f"--flagfile={path}"
    done = subprocess.run(
        [sys.executable, "-m", f"semiseg_jax.{command}", argument],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("Error: "), lines


# Platforms and clusters


PLATFORMS = """
from semiseg_jax.runtime import errors, xla
try:
    xla.require_platform()
except errors.UserError as error:
    print(error.code, error)
"""


@pytest.mark.parametrize("platforms", ["cuda", "rocm", "nonsense", "cuda,nonsense"])
def test_a_missing_platform_is_one_sentence(platforms):
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", PLATFORMS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        f"platform-missing JAX cannot start with JAX_PLATFORMS={platforms} ("
    )
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "8"}, 1),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, 1),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}, 4),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "2"}, 2),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "2(x3)"}, 1),
        ({"SLURM_STEP_NODELIST": "n1"}, 1),
    ],
)
def test_the_tasks_of_the_slurm_step_decide(monkeypatch, variables, tasks):
    for name in ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(multihost, "_join", lambda where, address, on_cpu: joined.append(address))
    multihost.initialize(None, None, None, on_cpu=True)
    assert joined == ([{"num_processes": tasks}] if tasks > 1 else [])


def test_a_run_ends_with_the_way_to_its_report_and_to_predictions(monkeypatch):
    monkeypatch.setattr(self_training, "run", lambda *_: None)
    with capture_lines() as lines:
        mains.run(monkeypatch, "--config=streets", "--workdir=runs/a b")
    assert "runs/a b/report.html" in lines[-1]
    assert "python -m semiseg_jax.predict --workdir='runs/a b' --input=" in lines[-1]
