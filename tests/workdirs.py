"""What a run leaves in its workdir, for tests that compare two; a run that trains nothing."""

import json

from safetensors.numpy import load_file


def rows(workdir):
    """The result rows of the ends of its stages."""
    return json.loads((workdir / "results.json").read_text())["rows"]


def contents(workdir):
    """Everything a run must reproduce: weights, pseudo-labels, results."""
    files = [workdir / "results.json", *workdir.rglob("pseudo_labels/**/*")]
    found = {str(p.relative_to(workdir)): p.read_bytes() for p in files if p.is_file()}
    weights = load_file(workdir / "model" / "weights.safetensors")
    return found | {k: v.tobytes() for k, v in weights.items()}


# Values in metrics.jsonl that depend on the clock.
CLOCK_TIMES = ("seconds", "images_per_second", "input_wait")


def metrics(workdir):
    """The lines of every metrics.jsonl, without clock times."""
    return {
        str(path.relative_to(workdir)): [
            {k: v for k, v in json.loads(line).items() if k not in CLOCK_TIMES}
            for line in path.read_text().splitlines()
        ]
        for path in workdir.rglob("metrics.jsonl")
    }


def same(workdir, other):
    """Two runs that ended with the same bits."""
    one, two = contents(workdir), contents(other)
    assert one.keys() == two.keys()
    assert [k for k in one if one[k] != two[k]] == [], other


def train_nothing(stage, program, init_variables, mesh, **_):
    """In place of `train.run`: the state before the first step."""
    return program.create_state(init_variables(), mesh)
