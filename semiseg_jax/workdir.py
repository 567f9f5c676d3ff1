"""The workdir of a run: the config and the images it belongs to, the checks of both, and its lock.

    WORKDIR/
      config.json            the config; another config is refused, with the keys that differ
      fitted.json            the settings that the run chose by itself, what the config gave, the
                             reason, and the --minutes that they were fitted to
      data.json              the training images: counts, hash of the ids, number of pixels, and
                             the hashes of all files
      pretrained.json        the initial weights of each backbone: name, hash, licence
      run.json, gallery/     versions, devices and thumbnails for the report
      results.json           one row per evaluated stage
      row_hashes.json        a hash of each row, and of the weights that it is of
      report.html            the report
      .lock                  the process that uses the workdir; exists only meanwhile
      model/                 the weights of the stage that `rounds.keep` chooses, with the weak
                             norm only, and all that inference needs
      round_0/teacher/       the first stage; then round_1/student/ and so on, round_N/control/
        checkpoints/         train states with their hashes; metrics.jsonl and TensorBoard events
                             are beside the folder
        image_counts.json    the pixels of each class in each evaluated image, for intervals over
                             images; holdout_counts.json has those of held-out images
        pseudo_labels/       manifest.json, health.json and a label map per unlabelled image
        DONE                 marks a finished stage; written last, atomically; holds the hashes of
                             its weights and of its teacher's, with which they are compared

The same command continues in the workdir where it stopped: it skips the stages with DONE and
restores the last checkpoint of the others. Therefore a workdir must never mix the results of two
configs or two sets of images (`check_config`, `check_data`), nor have two writers (`locked`).
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from flax import traverse_util

from semiseg_jax import __version__
from semiseg_jax.data import load
from semiseg_jax.data.data_record import RECORD_FORM, DataRecord
from semiseg_jax.data.split_lists import split_hash
from semiseg_jax.methods import registry
from semiseg_jax.models.dsbn import NORM_KINDS
from semiseg_jax.runtime import config_files, hashes, json_forms, multihost, paths, rules
from semiseg_jax.runtime.errors import UserError, printable, read_error, write_error
from semiseg_jax.runtime.fileio import has_rename, parse_json, read_text, write_bytes
from semiseg_jax.stages import DONE

# ---------------------------------------------------------------- the files of its identity

# Keys that configs/default.py declared after the first workdirs were written, each with the value
# that equals the behaviour of the older code. A config.json without the key has this value, and
# `config_hash` omits the key at this value.
ADDED_KEYS = {
    "rounds.teacher_from": "",
    "data.max_image_pixels": 2**28,
    "rounds.keep": "last",
    "data.in_both_lists": "refuse",
    "data.mask_colors": (),
    "data.mask_tolerance": 0,
    "data.mask_channel": "",
    "data.mask_threshold": 0,
    "eval.unlabeled_masks": "",
    "method.name": "self_training",
    "method.views.kind": "jitter",
    "method.views.jitter": (0.5, 0.5, 0.5, 0.25),
    "method.views.jitter_probability": 0.8,
    "method.views.grey_probability": 0.2,
    "method.views.blur_probability": 0.5,
    "method.views.blur_sigma": (0.1, 2.0),
    "method.views.per_batch": False,
    "method.views.partner": "other_image",
    **registry.DEFAULTS,
    "loss.labeled": "ce",
    "loss.ohem.probability": 0.7,
    "loss.ohem.share": 1 / 6,
    "loss.focal_gamma": 2.0,
    "loss.class_weights": "",
    "loss.absent_classes": "refuse",
    "optim.kind": "sgd",
    "optim.betas": (0.9, 0.999),
    "optim.epsilon": 1e-8,
    "optim.decay_all": False,
    "optim.layer_decay": 1.0,
    "model.position_rule": "original",
    "model.token_multiple": 1,
    "model.freeze_backbone": False,
    "data.cache_features": False,
    "data.balance_crops": False,
}

# By file: the form of its content. Files of older code lack the keys that may be missing.
_FORMS = {
    "config.json": json_forms.record(
        {
            **dict.fromkeys(("data", "model", "train"), json_forms.is_object),
            "rounds": json_forms.record({"count": json_forms.is_count}),
        }
    ),
    "data.json": json_forms.record(
        {
            **dict.fromkeys(("data", "ids_hash"), json_forms.is_text),
            **dict.fromkeys(("labeled", "unlabeled"), json_forms.is_count),
        },
        {"pixels": json_forms.is_count, "files": RECORD_FORM},
    ),
    "pretrained.json": json_forms.mapping_of(json_forms.record({"sha256": json_forms.is_text})),
    # Of a value any JSON is accepted: the config's own types and `config_check` restrict it.
    "fitted.json": json_forms.record(
        {
            "settings": json_forms.mapping_of(
                json_forms.record(
                    dict.fromkeys(("given", "value"), lambda value: True),
                    {"reason": json_forms.is_text},
                )
            )
        },
        {"minutes": json_forms.is_number},
    ),
}


def write_config(workdir: epath.PathLike, config: Any) -> None:
    """Writes config.json: from then on the workdir belongs to this config."""
    write_fingerprint(workdir, "config.json", _to_dict(config))


def write_data(workdir: epath.PathLike, dataset: load.Dataset) -> None:
    """Writes data.json: from then on the workdir belongs to these training images."""
    folder = epath.Path(workdir)
    content, recorded = _describe_images(dataset), read_record(folder)
    if recorded is not None and dataset.record is not None:
        # What was recorded at the first start stays: files may have been lost since.
        content["files"] = recorded.completed(dataset.record).to_json()
        old = read_fingerprint(folder, "data.json") or {}
        content["pixels"] = old.get("pixels", dataset.pixels)
    write_fingerprint(folder, "data.json", content)


def read_record(workdir: epath.Path) -> DataRecord | None:
    """Returns the record of the files in data.json; None in a new workdir and in older ones.

    Raises:
        UserError: as `read_fingerprint`.
    """
    content = read_fingerprint(workdir, "data.json")
    if content is None or "files" not in content:
        return None
    return DataRecord.from_json(content["files"])


def share_record(workdir: epath.Path) -> DataRecord | None:
    """Returns `read_record` of process 0; all processes must call the function."""

    def read() -> Any:
        record = read_record(workdir)
        return record and record.to_json()

    content = multihost.broadcast_from_main(f"files of the data of {workdir.name}", read)
    return None if content is None else DataRecord.from_json(content)


def write_pretrained(workdir: epath.PathLike, descriptions: dict[str, Any]) -> None:
    """Writes pretrained.json: from then on the workdir belongs to these initial weights.

    Args:
        workdir: path of the workdir.
        descriptions: by backbone, see `published_weights.describe`; nothing is written for {}.
    """
    if descriptions:
        write_fingerprint(workdir, "pretrained.json", descriptions)


def write_fingerprint(workdir: epath.PathLike, name: str, content: dict[str, Any]) -> None:
    """Writes a file that `read_fingerprint` reads, unless it has this content already."""
    path, text = epath.Path(workdir) / name, json.dumps(content, indent=1) + "\n"
    if not path.exists() or read_text(path) != text:
        write_bytes(path, text.encode())


def read_fingerprint(workdir: epath.Path, name: str) -> dict[str, Any] | None:
    """Returns the content of one of the files that identify a workdir; None in a new workdir.

    Args:
        workdir: path of the workdir.
        name: config.json, data.json, pretrained.json or fitted.json.

    Raises:
        UserError: the file is not readable; or it is damaged, or missing beside checkpoints.
    """
    path = workdir / name
    if not path.exists():
        if not _has_checkpoints(workdir):
            return None
        raise UserError(
            f"{path} is missing, the record of what the stages beside it were trained with: "
            "restore it, or give another --workdir.",
            code="fingerprint-missing",
        )
    try:
        content = parse_json(read_text(path))
        if not _FORMS[name](content):
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


def _has_checkpoints(workdir: epath.Path) -> bool:
    """Returns whether a stage of the workdir has begun to train."""
    return any(True for _ in workdir.glob("round_*/*/checkpoints"))


def config_hash(config: Any) -> str:
    """Returns 16 hex digits that identify the whole config, paths included.

    Omits ADDED_KEYS at their defaults, so that a new key changes no hash.
    """
    flat = traverse_util.flatten_dict(_to_dict(config), sep=".")
    hashed = {
        k: v for k, v in flat.items() if k not in ADDED_KEYS or rules.to_tuples(v) != ADDED_KEYS[k]
    }
    return hashes.hash_json(traverse_util.unflatten_dict(hashed, sep="."))


@functools.cache
def code_version() -> str:
    """Returns the package version with the commit of its git checkout, such as "0.1.0+6ade258…".

    Returns the version alone if the package is not in a git checkout, or only lies in one of
    another project, as the packages of an environment may.
    """
    if config_files.is_installed():
        return __version__
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "--short=12", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"


def _git(*arguments: str) -> str:
    """Returns what a git command prints about the folder of this file.

    Raises:
        OSError, subprocess.SubprocessError: there is no git, or the command failed.
    """
    # A program that git starts has these variables, which may name another repository.
    names = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    process = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10, env=environment
    )
    return process.stdout.strip()


def _to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as config.json stores it, with lists instead of tuples."""
    return json.loads(config.to_json_best_effort())


def _describe_images(dataset: load.Dataset) -> dict[str, Any]:
    """Returns the content of data.json for a data set."""
    # With the unlabelled images that are left out: they belong to the split.
    unlabeled = dataset.unlabeled_ids
    content = {
        "data": dataset.name,
        "labeled": len(dataset.labeled),
        "unlabeled": len(unlabeled),
        "ids_hash": split_hash([[e.id for e in dataset.labeled], unlabeled]),
        "pixels": dataset.pixels,
    }
    return content | ({"files": dataset.record.to_json()} if dataset.record else {})


# ---------------------------------------------------------------- checks of its identity

# Keys that may differ when a run continues, because the result of no stage depends on them. Most
# keys of `eval` may too, see `check_config`. (`check_data` identifies the images under another root
# by ids and size.)
RESUME_SAFE_KEYS = frozenset(
    {
        "data.root",
        "data.cache_dir",
        "data.prefetch",
        "data.threads",
        "data.max_image_pixels",
        "data.palette",
        "train.log_every",
        "train.checkpoint_every",
        "train.profile_at",
        "pseudo.batch",
        "pseudo.keep_confidence",
        "eval.unlabeled_masks",
        "rounds.control",
        # Read at the end of a run.
        "rounds.keep",
        # Read only while the workdir has no teacher.
        "rounds.teacher_from",
    }
)

# Prefixes of the keys that no teacher depends on.
TEACHER_INDEPENDENT_KEYS = (
    *("data.weak_stream", "data.strong_stream", "data.unlabeled", "data.train_extra", "sda."),
    *("loss.unlabeled", "loss.scl.", "pseudo.", "eval.", "rounds."),
    *("optim.student.", "train.steps"),
    *("train.batch_unlabeled", "model.norm", "method."),
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
        if key in RESUME_SAFE_KEYS:
            return True
        if key.startswith("eval.") and key != "eval.pad_to":
            return not eval_selects
        return key == "rounds.count" and new[key] > old.get(key, 0)

    differences = [d for key, d in _differences(old, new).items() if not may_differ(key)]
    if differences:
        raise UserError(
            f"The workdir {workdir} belongs to another config ({'; '.join(differences)}): give "
            "another --workdir, or the config it was made with.",
            code="workdir-of-another-config",
        )


def check_data(workdir: epath.PathLike, dataset: load.Dataset) -> None:
    """Rejects a workdir that belongs to other training images, or to other content of them.

    Raises:
        UserError: with the old and the new counts of images, or the first file that was changed.
    """
    workdir = epath.Path(workdir)
    old, new = read_fingerprint(workdir, "data.json"), _describe_images(dataset)
    recorded = read_record(workdir)
    # A data.json of older code has no "pixels" and no "files". The files are compared below; the
    # number of pixels of an image that is or was left out is not known.
    is_complete = not dataset.left_out and (recorded is None or recorded.is_complete)
    compared = new.keys() - {"files"} - (set() if is_complete else {"pixels"})
    if old is not None and any(old[key] != new[key] for key in compared & old.keys()):
        same_ids = all(old[key] == new[key] for key in ("labeled", "unlabeled", "ids_hash"))
        sizes = ", of other sizes" if same_ids and old["data"] == new["data"] else ""
        raise UserError(
            f"The data changed since {workdir} was begun ({old['labeled']} labelled and "
            f"{old['unlabeled']} unlabelled images of {old['data']} then, {new['labeled']} and "
            f"{new['unlabeled']} of {new['data']} now{sizes}): restore it, or give "
            "another --workdir.",
            code="data-changed",
        )
    if recorded is None or dataset.record is None:
        return
    if changed := recorded.first_change(dataset.record):
        raise UserError(
            f"{os.path.join(dataset.root, changed)} was changed since {workdir} was begun: restore "
            "it, or give another --workdir to train on what it is now.",
            code="training-file-changed",
        )


def check_pretrained(workdir: epath.PathLike, descriptions: dict[str, Any]) -> None:
    """Rejects a workdir whose networks started from other weights under the same name.

    Args:
        workdir: path of the workdir; one of older code, without pretrained.json, is accepted.
        descriptions: see `write_pretrained`.

    Raises:
        UserError: naming the weights.
    """
    if not (epath.Path(workdir) / "pretrained.json").exists():
        return
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
    differences = _differences(teacher_keys(old), teacher_keys(new))
    if old.get("model.norm") not in NORM_KINDS:  # It may differ otherwise.
        differences["model.norm"] = f"model.norm: {old.get('model.norm')!r} there"
    if differences:
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
    record = read_record(workdir)
    # The reported weights of the teacher are selected by the others.
    names = ["labeled", "selection"]
    if config.eval.select == "reported":
        names += ["evaluation", "holdout"]
    is_changed = record and dataset.record and record.first_change(dataset.record, names)
    if images is None or is_changed or any(images[key] != here[key] for key in keys):
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
    """Returns {"data.root": …} for {"data": {"root": …}}; ADDED_KEYS that are missing are added.

    Lists become tuples, which the config and ADDED_KEYS have.
    A ~ in a path, which older code recorded as it was written, is replaced by the home folder.
    """
    flat = ADDED_KEYS | rules.to_tuples(traverse_util.flatten_dict(config, sep="."))
    recorded = {key: flat[key] for key in paths.PATH_KEYS if isinstance(flat.get(key), str)}
    return flat | {key: os.path.expanduser(path) for key, path in recorded.items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Returns texts such as "seed: 0 there, 1 here" by key, in order of the keys that differ."""
    return {
        key: f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


# ---------------------------------------------------------------- the lock: one run at a time

LOCK_FILE = ".lock"
# The content of a lock file: nothing, or the process id and the host of the last holder.
_HOLDER = re.compile(rb"(\d+ [^\n]*\n?)?")
# Errors of file systems without locks. On these, as in stores such as gs://, nothing is locked.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
    """Locks a workdir for this run; of several processes, process 0 holds the lock.

    The system releases the lock when the process ends, however it ends: a lock file that a killed
    process left behind locks nothing.

    Raises:
        UserError: another run uses the workdir, or the folder is not writable, or its path is not
            UTF-8, as TensorFlow, which writes the events, requires.
    """
    if printable(os.fspath(workdir)) != os.fspath(workdir):
        raise UserError(
            f"The path of the workdir {workdir} is not UTF-8: give another --workdir.",
            code="workdir-not-utf8",
        )
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
        try:
            # Not through a link, and without waiting for another end, which a FIFO may need.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if os.path.lexists(path) and not _is_lock_file(os.lstat(path)):
                raise _foreign_lock(path) from error
            raise
        try:
            if not _is_lock_file(os.fstat(descriptor)):
                raise _foreign_lock(path)
            _flock(folder, descriptor)
            if not _HOLDER.fullmatch(os.pread(descriptor, 300, 0)):
                raise _foreign_lock(path)
            if _is_file_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Between open and lock, the previous holder removed the file: the lock excludes nobody.
        os.close(descriptor)


def _is_lock_file(status: os.stat_result) -> bool:
    """Whether a file is a regular one with a single name, so that to write it changes no other."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def _foreign_lock(path: str) -> UserError:
    return UserError(
        f"{path} is no lock of a run, but a file of something else: move it, or give another "
        "--workdir.",
        code="lock-of-something-else",
    )


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
