"""What a workdir is of: config.json and data.json, by which another config or data are refused."""

import json
from typing import Any

from etils import epath
from flax import traverse_util

from semiseg_jax.data import sources
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.data.splits import split_hash
from semiseg_jax.errors import UserError, unread

# Keys beside most of `eval` that may change while a run goes on: no stage's result follows from
# them. (Images that moved to another root are the same by id and size, see `refuse_other_data`.)
FREE = frozenset(
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
    }
)

# What such a file has at least; later versions added to it.
_KEYS = {
    "config.json": {"data", "model", "train", "rounds"},
    "data.json": {"data", "labeled", "unlabeled", "ids_hash"},
}


def refuse_other_config(workdir: epath.PathLike, config: Any) -> None:
    """Refuses a workdir that belongs to another config.

    What changes no stage's result may differ: FREE keys, those of `eval` unless the weights of a
    stage were chosen by evaluating, and more rounds than there were. `eval.pad_to` may not: the
    images that a teacher labels are padded by it too.

    Raises:
        UserError: naming the keys that differ.
    """
    then = known(epath.Path(workdir), "config.json")
    if then is None:
        return
    old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (then, _plain(config)))
    chosen = any(tree.get("eval.select", "last") != "last" for tree in (old, new))
    differing = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not (key.startswith("eval.") and key != "eval.pad_to" and not chosen)
        and key not in FREE
        and not (key == "rounds.count" and new[key] > old.get(key, 0))
    ]
    if differing:
        raise UserError(
            f"The workdir {workdir} belongs to another config ({'; '.join(differing)}): give "
            "another --workdir, or the config it was made with."
        )


def refuse_other_data(workdir: epath.PathLike, dataset: sources.Dataset) -> None:
    """Refuses to go on with other training images than a workdir began with.

    Raises:
        UserError: with the counts of images then and now.
    """
    then, now = known(epath.Path(workdir), "data.json"), _described(dataset)
    # What was written before pixels were counted does not tell them.
    if then is not None and then != {key: now[key] for key in now if key in then}:
        same = all(then[key] == now[key] for key in ("labeled", "unlabeled", "ids_hash"))
        sizes = ", of other sizes" if same and then["data"] == now["data"] else ""
        raise UserError(
            f"The data changed since {workdir} was begun ({then['labeled']} labelled and "
            f"{then['unlabeled']} unlabelled images of {then['data']} then, {now['labeled']} and "
            f"{now['unlabeled']} of {now['data']} now{sizes}): restore it, or give "
            "another --workdir."
        )


def keep_data(workdir: epath.PathLike, dataset: sources.Dataset) -> None:
    """Writes data.json, by which the workdir knows its images."""
    _keep(epath.Path(workdir) / "data.json", _described(dataset))


def _described(dataset: sources.Dataset) -> dict[str, Any]:
    return {
        "data": dataset.name,
        "labeled": len(dataset.labeled),
        "unlabeled": len(dataset.unlabeled),
        "ids_hash": split_hash([[e.id for e in p] for p in (dataset.labeled, dataset.unlabeled)]),
        "pixels": dataset.pixels,
    }


def keep_config(workdir: epath.PathLike, config: Any) -> None:
    """Writes config.json, by which the workdir knows its config."""
    _keep(epath.Path(workdir) / "config.json", _plain(config))


def known(workdir: epath.Path, name: str) -> dict[str, Any] | None:
    """What a file says by which a workdir knows what it is of; None in a new workdir."""
    path = workdir / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not content.keys() >= _KEYS[name]:
            raise ValueError("it is of another form")
        return content
    except OSError as error:
        raise unread(path, error, "make it readable, or give another --workdir") from error
    except ValueError as error:
        if not (workdir / "round_0").exists():
            return None  # The run ended as it began: nothing is there that the file is of.
        raise UserError(
            f"{path} cannot be read ({error}): restore it, or give another --workdir."
        ) from error


def _keep(path: epath.Path, content: dict[str, Any]) -> None:
    """Writes such a file, where it does not say so already."""
    text = json.dumps(content, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        write_bytes(path, text.encode())


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())
