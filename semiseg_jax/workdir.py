"""The workdir of a run: the config and the images it belongs to, the checks of both, and its lock.

    WORKDIR/
      config.json            the config; another config is refused, with the keys that differ
      data.json              the training images: counts, hash of the ids, number of pixels
      pretrained.json        the initial weights of each backbone: name, hash, licence
      run.json, gallery/     versions, devices and thumbnails for the report
      results.json           one row per evaluated stage
      report.html            the report
      .lock                  the process that uses the workdir; exists only meanwhile
      model/                 the final weights with the weak norm only, and all that inference needs
      round_0/teacher/       the first stage; then round_1/student/ and so on, round_N/control/
        checkpoints/         train states, metrics.jsonl and TensorBoard events beside them
        pseudo_labels/       manifest.json, health.json and a label map per unlabelled image
        DONE                 marks a finished stage; written last, atomically

The same command continues in the workdir where it stopped: it skips the stages with DONE and
restores the last checkpoint of the others. Therefore a workdir must never mix the results of two
configs or two sets of images (`check_config`, `check_data`), nor have two writers (`locked`).
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from flax import traverse_util

from semiseg_jax import __version__
from semiseg_jax.data import load
from semiseg_jax.data.split_lists import split_hash
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError, read_error, write_error
from semiseg_jax.runtime.fileio import has_rename, write_bytes
from semiseg_jax.stages import DONE

# ---------------------------------------------------------------- what a workdir belongs to

# Keys that configs/default.py declared after the first workdirs were written, each with the value
# that equals the behaviour of the older code. A config.json without the key has this value, and
# `config_hash` omits the key at this value.
ADDED_KEYS = {"rounds.teacher_from": ""}

# Keys that every such file has; later versions added more.
_REQUIRED_KEYS = {
    "config.json": {"data", "model", "train", "rounds"},
    "data.json": {"data", "labeled", "unlabeled", "ids_hash"},
    "pretrained.json": set(),
}


def write_config(workdir: epath.PathLike, config: Any) -> None:
    """Writes config.json: from then on the workdir belongs to this config."""
    _write_if_changed(epath.Path(workdir) / "config.json", _to_dict(config))


def write_data(workdir: epath.PathLike, dataset: load.Dataset) -> None:
    """Writes data.json: from then on the workdir belongs to these training images."""
    _write_if_changed(epath.Path(workdir) / "data.json", _describe_images(dataset))


def write_pretrained(workdir: epath.PathLike, descriptions: dict[str, Any]) -> None:
    """Writes pretrained.json: from then on the workdir belongs to these initial weights.

    Args:
        workdir: path of the workdir.
        descriptions: by backbone, see `published_weights.describe`; nothing is written for {}.
    """
    if descriptions:
        _write_if_changed(epath.Path(workdir) / "pretrained.json", descriptions)


def read_fingerprint(workdir: epath.Path, name: str) -> dict[str, Any] | None:
    """Returns the content of config.json, data.json or pretrained.json; None in a new workdir.

    Args:
        workdir: path of the workdir.
        name: name of the file.

    Raises:
        UserError: the file is not readable, or damaged in a workdir that has stages.
    """
    path = workdir / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not content.keys() >= _REQUIRED_KEYS[name]:
            raise ValueError("it is of another form")
        return content
    except OSError as error:
        raise read_error(path, error, "make it readable, or give another --workdir") from error
    except ValueError as error:
        if not (workdir / "round_0").exists():
            return None  # No stage has started, so that there is nothing to protect.
        raise UserError(
            f"{path} cannot be read ({error}): restore it, or give another --workdir.",
            code="fingerprint-damaged",
        ) from error


def config_hash(config: Any) -> str:
    """Returns 16 hex digits that identify the whole config, paths included.

    Omits ADDED_KEYS at their defaults, so that a new key changes no hash.
    """
    flat = traverse_util.flatten_dict(_to_dict(config), sep=".")
    hashed = {k: v for k, v in flat.items() if k not in ADDED_KEYS or v != ADDED_KEYS[k]}
    text = json.dumps(traverse_util.unflatten_dict(hashed, sep="."), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_version() -> str:
    """Returns the package version with the commit of its git checkout, such as "0.1.0+6ade258…".

    Returns the version alone if the package is not in a git checkout.
    """
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit.stdout.strip()}"


def _to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as config.json stores it, with lists instead of tuples."""
    return json.loads(config.to_json_best_effort())


def _describe_images(dataset: load.Dataset) -> dict[str, Any]:
    """Returns the content of data.json for a data set."""
    ids = [[e.id for e in examples] for examples in (dataset.labeled, dataset.unlabeled)]
    return {
        "data": dataset.name,
        "labeled": len(dataset.labeled),
        "unlabeled": len(dataset.unlabeled),
        "ids_hash": split_hash(ids),
        "pixels": dataset.pixels,
    }


def _write_if_changed(path: epath.Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        write_bytes(path, text.encode())


# ---------------------------------------------------------------- how that is checked

# Keys that may differ when a run continues, because the result of no stage depends on them. Most
# keys of `eval` may too, see `check_config`. (`check_data` identifies the images under another root
# by ids and size.)
RESUME_SAFE_KEYS = frozenset(
    {
        "data.root",
        "data.cache_dir",
        "data.prefetch",
        "data.threads",
        "data.palette",
        "train.log_every",
        "train.checkpoint_every",
        "train.profile_at",
        "pseudo.batch",
        "pseudo.keep_confidence",
        "rounds.control",
        # Read only while the workdir has no teacher.
        "rounds.teacher_from",
    }
)

# Prefixes of the keys that no teacher depends on.
TEACHER_INDEPENDENT_KEYS = (
    *("data.weak_stream", "data.strong_stream", "data.unlabeled", "data.train_extra", "sda."),
    *("loss.", "pseudo.", "eval.", "rounds.", "optim.student.", "train.steps"),
    *("train.batch_unlabeled", "model.norm"),
)


def check_config(workdir: epath.PathLike, config: Any) -> None:
    """Rejects a workdir that belongs to another config.

    These keys may differ: RESUME_SAFE_KEYS; those of `eval`, unless evaluation selects the weights;
    and `rounds.count` if it is larger than before. `eval.pad_to` may not, because it also pads the
    images that a teacher labels.

    Raises:
        UserError: naming the keys that differ.
    """
    recorded = read_fingerprint(epath.Path(workdir), "config.json")
    if recorded is None:
        return
    old, new = _flatten(recorded), _flatten(_to_dict(config))
    eval_selects = any(flat.get("eval.select", "last") != "last" for flat in (old, new))

    def may_differ(key: str) -> bool:
        if key.startswith("eval.") and key != "eval.pad_to":
            return not eval_selects
        if key == "rounds.count":
            return new[key] > old.get(key, 0)
        return key in RESUME_SAFE_KEYS

    differences = [d for key, d in _differences(old, new).items() if not may_differ(key)]
    if differences:
        raise UserError(
            f"The workdir {workdir} belongs to another config ({'; '.join(differences)}): give "
            "another --workdir, or the config it was made with.",
            code="workdir-of-another-config",
        )


def check_data(workdir: epath.PathLike, dataset: load.Dataset) -> None:
    """Rejects a workdir that belongs to other training images.

    Raises:
        UserError: with the old and the new counts of images.
    """
    old, new = read_fingerprint(epath.Path(workdir), "data.json"), _describe_images(dataset)
    # A data.json of older code has no "pixels".
    if old is not None and old != {key: new[key] for key in new if key in old}:
        same_ids = all(old[key] == new[key] for key in ("labeled", "unlabeled", "ids_hash"))
        sizes = ", of other sizes" if same_ids and old["data"] == new["data"] else ""
        raise UserError(
            f"The data changed since {workdir} was begun ({old['labeled']} labelled and "
            f"{old['unlabeled']} unlabelled images of {old['data']} then, {new['labeled']} and "
            f"{new['unlabeled']} of {new['data']} now{sizes}): restore it, or give "
            "another --workdir.",
            code="data-changed",
        )


def check_pretrained(workdir: epath.PathLike, descriptions: dict[str, Any]) -> None:
    """Rejects a workdir whose networks started from other weights under the same name.

    Args:
        workdir: path of the workdir; one of older code, without pretrained.json, is accepted.
        descriptions: see `write_pretrained`.

    Raises:
        UserError: naming the weights.
    """
    recorded = read_fingerprint(epath.Path(workdir), "pretrained.json") or {}
    for backbone in descriptions.keys() & recorded.keys():
        old, new = recorded[backbone], descriptions[backbone]
        if old["sha256"] != new["sha256"]:
            raise UserError(
                f"The initial weights of {backbone} ({new['name']}) changed since {workdir} was "
                f"begun (SHA-256 {old['sha256']} then, {new['sha256']} now): restore the file, or "
                "give another --workdir.",
                code="pretrained-changed",
            )


def check_teacher(workdir: epath.Path, config: Any, dataset: load.Dataset) -> str:
    """Rejects a teacher of another workdir that training with this config would not produce.

    Args:
        workdir: the workdir with the teacher.
        config: config of the run that imports the teacher.
        dataset: the images of that run. Unlabelled images may differ: no teacher sees them.

    Returns:
        `model.norm` of the teacher's network.

    Raises:
        UserError: there is no finished teacher, it was trained on other labelled images, or the
            configs differ in a key that teachers depend on.
    """
    recorded = read_fingerprint(workdir, "config.json")
    if recorded is None or not (workdir / "round_0" / "teacher" / DONE).exists():
        raise UserError(
            f"rounds.teacher_from is {workdir}, which has no finished teacher: run its own command "
            "first, or name another workdir.",
            code="teacher-unfinished",
        )
    old, new = _flatten(recorded), _flatten(_to_dict(config))
    if differences := _differences(teacher_keys(old), teacher_keys(new)):
        raise UserError(
            f"rounds.teacher_from is {workdir}, whose teacher was trained with another config "
            f"({'; '.join(differences.values())}): name another workdir, or train a teacher with "
            "rounds.teacher_from=''.",
            code="teacher-of-another-config",
        )
    images, here = read_fingerprint(workdir, "data.json"), _describe_images(dataset)
    # The hash covers both kinds of image, so it decides only where there are as many of each.
    keys = ["data", "labeled"]
    if images is not None and images["unlabeled"] == here["unlabeled"]:
        keys.append("ids_hash")
    if images is None or any(images[key] != here[key] for key in keys):
        raise UserError(
            f"rounds.teacher_from is {workdir}, whose teacher was trained on other images: name "
            "another workdir, or train a teacher with rounds.teacher_from=''.",
            code="teacher-of-other-images",
        )
    return old["model.norm"]


def teacher_keys(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a flat config that the weights of a teacher depend on."""
    return {
        key: value
        for key, value in (ADDED_KEYS | flat).items()
        if key not in RESUME_SAFE_KEYS
        and (key.startswith("model.norm_") or not key.startswith(TEACHER_INDEPENDENT_KEYS))
    }


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Returns {"data.root": …} for {"data": {"root": …}}; ADDED_KEYS that are missing are added."""
    return ADDED_KEYS | traverse_util.flatten_dict(config, sep=".")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Returns texts such as "seed: 0 there, 1 here" by key, in order of the keys that differ."""
    return {
        key: f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


# ---------------------------------------------------------------- who holds it: one run at a time

LOCK_FILE = ".lock"
# Errors of file systems without locks. On these, as in stores such as gs://, nothing is locked.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
    """Locks a workdir for this run; of several processes, process 0 holds the lock.

    The system releases the lock when the process ends, however it ends: a lock file that a killed
    process left behind locks nothing.

    Raises:
        UserError: another run uses the workdir, or the folder is not writable.
    """
    with contextlib.ExitStack() as stack:
        if has_rename(workdir):
            folder = os.fspath(workdir)
            multihost.broadcast_from_main(
                "workdir locked", lambda: stack.enter_context(_lock_folder(folder))
            )
        yield


@contextlib.contextmanager
def _lock_folder(folder: str) -> Iterator[None]:
    is_new = not os.path.exists(folder)
    path = os.path.join(folder, LOCK_FILE)
    try:
        descriptor = _open_locked(folder, path)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # Before the lock is released: after it, the file may be another run's.
        os.close(descriptor)
        if is_new:
            # A run that could not start leaves no empty folder.
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _open_locked(folder: str, path: str) -> int:
    """Opens and locks the lock file, and writes this process's id and host to it.

    Returns:
        The file descriptor; closing it releases the lock.
    """
    while True:
        os.makedirs(folder or ".", exist_ok=True)
        # Python opens files as non-inheritable, so that a program which this process starts does
        # not hold the lock. A fork without exec would; this package does none.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(folder, descriptor)
            if _is_file_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Between open and lock, the previous holder removed the file: the lock excludes nobody.
        os.close(descriptor)


def _flock(folder: str, descriptor: int) -> None:
    """Locks an open file without waiting; does nothing on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        process, _, host = os.read(descriptor, 300).decode(errors="replace").strip().partition(" ")
        holder = f"process {process} on {host}" if host else "another process"
        raise UserError(
            f"The workdir {folder} is in use by {holder}: wait until it has ended, or end it, or "
            "give another --workdir.",
            code="workdir-in-use",
        ) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _is_file_at(path: str, descriptor: int) -> bool:
    """Returns whether the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
