"""The commands that tell and fit the time of a run."""

import json
import re

import pytest

from tests import mains

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("without_report"),
]

CONFIG = (
    "--config=configs/streets.py",
    *mains.TINY,
    "--config.rounds.control=True",
    "--config.data.streets_size=(32,48)",
    "--config.data.streets_train=12",
    "--config.data.streets_val=4",
    "--config.data.labels=4.0",
)


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls a command; returns what it printed, with the sentence that it ended with."""

    def call(command, *arguments):
        sentence = ""
        try:
            mains.run(monkeypatch, *CONFIG, *arguments, command=command, predicts_time=True)
        except SystemExit as end:
            sentence = end.code
        printed = capsys.readouterr()
        return sentence, printed.out + printed.err

    return call


def test_a_run_is_fitted_once_and_told_how_long_it_takes(call, tmp_path):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    sentence, planned = call("plan", cache)
    parts = "teacher .*, pseudo-labels .*, student .*, control "
    told = rf"This run takes about .* on this machine: {parts}"
    assert not sentence and re.search(told, planned), planned
    run = (cache, f"--workdir={tmp_path / 'run'}")
    sentence, output = call("main", *run, "--minutes=60")
    assert not sentence, output
    assert re.search(r"60 minutes: teacher [\d,]+ steps, one round of [\d,]+ steps, con", output)
    assert re.search(told, output)
    content = json.loads((tmp_path / "run" / "fitted.json").read_text())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["minutes"] == 60
    assert config["train"]["steps"] == content["settings"]["train.steps"]["value"] > 2
    sentence, output = call("main", *run)
    assert not sentence and "control 1: done before" in output
    sentence, output = call("main", *run, "--minutes=61")
    assert "was begun with --minutes=60" in sentence


def test_flags_that_are_refused(call):
    sentence, output = call("main", "--minutes=an hour")
    assert "--minutes" in sentence and "Traceback" not in output
    sentence, output = call("plan", "--step-only")
    assert "--step-only needs --topology" in sentence and "Traceback" not in output
