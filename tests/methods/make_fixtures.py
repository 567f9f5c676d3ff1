"""Writes fixtures/: numbers that the authors' published code computes from `arrays.py`.

    python tests/methods/make_fixtures.py FOLDER [NAME ...]

FOLDER holds checkouts of the repositories below, each under its name. NAME is a fixture; all of
them without one. The environment needs NumPy; pseudoseg needs TensorFlow, the others Pillow, torch
and torchvision. Functions of the published code are run, and statements within its training
scripts, which are found by their first and last line. A fixture names the repository, its files
and the commit.
"""

import ast
import importlib
import json
import pathlib
import subprocess
import sys
import textwrap
import types

FOLDER = pathlib.Path(__file__).parent / "fixtures"
# The repository of each fixture, and the module of the function, of the fixture's name, that
# returns its numbers.
FIXTURES = {
    "french2019": ("Britefury/cutmix-semisup-seg", "fixtures_torch"),
    "classmix": ("WilhelmT/ClassMix", "fixtures_torch"),
    "unimatch": ("LiheYoung/UniMatch", "fixtures_torch"),
    "unimatch_v2": ("LiheYoung/UniMatch-V2", "fixtures_torch"),
    "cct": ("yassouali/CCT", "fixtures_torch"),
    "pseudoseg": ("googleinterns/wss", "fixtures_tensorflow"),
}


class Repository:
    """A checkout of published code."""

    def __init__(self, root, name):
        self.path = root / name.split("/")[1]
        command = ["git", "-C", str(self.path), "rev-parse", "HEAD"]
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        self.origin = {"repository": name, "commit": commit, "files": []}

    def source(self, file):
        if file not in self.origin["files"]:
            self.origin["files"].append(file)
        return (self.path / file).read_text()

    def module(self, file):
        """Runs a file whose imports are there."""
        module = types.ModuleType(pathlib.Path(file).stem)
        exec(compile(self.source(file), file, "exec"), module.__dict__)
        return module

    def function(self, file, name, scope):
        """One function of a file, with the globals that it needs."""
        for node in ast.parse(self.source(file)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                exec(compile(ast.Module([node], []), file, "exec"), scope)
        return scope[name]

    def run(self, file, first, last, scope):
        """Runs the lines from the first that contains `first` to the next that contains `last`."""
        lines = self.source(file).splitlines()
        start = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i >= start and last in line)
        exec(textwrap.dedent("\n".join(lines[start : end + 1])), scope)


def main(folder, names):
    for name in names or FIXTURES:
        repository_name, module = FIXTURES[name]
        repository = Repository(pathlib.Path(folder), repository_name)
        numbers = getattr(importlib.import_module(module), name)(repository)
        numbers = {"origin": repository.origin, **numbers}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in numbers.items()]
        (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
