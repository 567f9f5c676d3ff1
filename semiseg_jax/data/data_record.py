"""The record of the files that a run trains on, by which changed and lost files are noticed."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from semiseg_jax.runtime import json_forms

# The sets that weights depend on, and the evaluation set, which is named "holdout" if it was held
# out from the training images.
TRAINING_SETS = ("labeled", "selection", "unlabeled")
SETS = (*TRAINING_SETS, "evaluation", "holdout")


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file and the hashes of its content.

    Attributes:
        path: path of the file, relative to the root of the data set if it is below it.
        file_hash, pixel_hash: as in `file_content.FileContent`; "" if the file is not readable.
    """

    path: str
    file_hash: str = ""
    pixel_hash: str = ""

    def is_same(self, other: "FileRecord") -> bool:
        """Returns whether two files have the same bytes or the same pixels.

        The bytes decide alone for a file that another version of the decoder read; the pixels for a
        file that was encoded again. A file that was never readable has no content to differ from.
        """
        if not (self.file_hash and other.file_hash):
            return True
        return self.file_hash == other.file_hash or self.pixel_hash == other.pixel_hash


@dataclasses.dataclass(frozen=True)
class ExampleRecord:
    """The files of an example; `mask` is None for unlabelled images."""

    image: FileRecord
    mask: FileRecord | None = None

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """The image and the mask, if any."""
        return (self.image,) if self.mask is None else (self.image, self.mask)


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """The files of a data set.

    Attributes:
        sets: examples by name of the set, out of SETS, and by id, in the order of the set. Images
            that were left out because they are not readable are included, without hashes.
        evaluation: by `split_hash` of an evaluation set, a hash of the content of its files.
    """

    sets: Mapping[str, Mapping[str, ExampleRecord]]
    evaluation: Mapping[str, str]

    def examples(self) -> Iterator[tuple[str, str, ExampleRecord]]:
        """Yields (name of the set, id, example)."""
        for name, examples in self.sets.items():
            for id_, example in examples.items():
                yield name, id_, example

    @property
    def is_complete(self) -> bool:
        """Whether every image was readable when it was recorded."""
        return all(example.image.file_hash for _, _, example in self.examples())

    def ids(self, name: str) -> frozenset[str]:
        """Returns the ids of a set; none if the record has no such set."""
        return frozenset(self.sets.get(name, ()))

    def first_change(self, other: "DataRecord", names: Sequence[str] = TRAINING_SETS) -> str | None:
        """Returns the path of the first file whose content differs in `other`; None if none does.

        Files that only one of the two records has are not compared.

        Args:
            other: the other record; the path is that in it.
            names: the sets to compare.
        """
        for name, id_, example in self.examples():
            other_example = other.sets.get(name, {}).get(id_)
            if other_example is None or name not in names:
                continue
            # A mask that was added or removed changes the split, which is compared elsewhere.
            for file, other_file in zip(example.files, other_example.files, strict=False):
                if not file.is_same(other_file):
                    return other_file.path
        return None

    def has_same_image(self, other: "DataRecord", name: str, id_: str) -> bool:
        """Returns whether an image of a set is in both records, with the same content."""
        first, second = (record.sets.get(name, {}).get(id_) for record in (self, other))
        return first is not None and second is not None and first.image.is_same(second.image)

    def completed(self, newer: "DataRecord") -> "DataRecord":
        """Returns this record with the files of `newer` that it lacks or could not read.

        The evaluation set is that of `newer`, because a run may be evaluated on several.
        """
        sets = {**self.sets, **newer.sets}
        for name in TRAINING_SETS:
            readable = {k: v for k, v in self.sets.get(name, {}).items() if v.image.file_hash}
            sets[name] = {k: readable.get(k, v) for k, v in newer.sets.get(name, {}).items()}
        return DataRecord(sets, {**self.evaluation, **newer.evaluation})

    def to_json(self) -> dict[str, Any]:
        """Returns the content for data.json."""
        sets: dict[str, dict[str, list[list[str]]]] = {
            name: {} for name, examples in self.sets.items() if examples
        }
        for name, id_, example in self.examples():
            sets[name][id_] = [list(dataclasses.astuple(file)) for file in example.files]
        return {"sets": sets, "evaluation": dict(self.evaluation)}

    @classmethod
    def from_json(cls, content: Any) -> "DataRecord":
        """Returns the record that `to_json` converted; the content has the form `RECORD_FORM`."""
        sets = {
            name: {
                id_: ExampleRecord(*(FileRecord(*file) for file in files))
                for id_, files in content["sets"][name].items()
            }
            for name in SETS
            if name in content["sets"]
        }
        return cls(sets, dict(content["evaluation"]))


def _is_path(value: Any) -> bool:
    """Returns whether a value may be the path of a file, whose name need not be UTF-8."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _is_file(value: Any) -> bool:
    is_list = json_forms.list_of(_is_path, range(3, 4))
    return is_list(value) and value[0] != ""


# Of what `DataRecord.to_json` returns.
RECORD_FORM = json_forms.record(
    {
        "sets": json_forms.mapping_of(
            json_forms.mapping_of(json_forms.list_of(_is_file, range(1, 3)), json_forms.is_name)
        ),
        "evaluation": json_forms.mapping_of(json_forms.is_text),
    }
)


def relative_path(path: str, root: epath.PathLike) -> str:
    """Returns the path relative to the root if it is below it, else unchanged or absolute."""
    if "://" in path:
        return path.removeprefix(f"{os.fspath(root).rstrip('/')}/")
    absolute, folder = os.path.abspath(path), os.path.abspath(root)
    prefix = folder.rstrip(os.sep) + os.sep
    return absolute.removeprefix(prefix)
