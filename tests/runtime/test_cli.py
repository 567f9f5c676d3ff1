"""Values on the command line: overrides of config keys, and paths."""

import io
import sys

import pytest
from absl import flags
from flax import traverse_util
from ml_collections import config_flags

from configs import default
from semiseg_jax.data import splits
from semiseg_jax.runtime import cli
from semiseg_jax.runtime.logger import RunConsole, logger

# ml_collections loads config files by a deprecated method.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEFAULTS = traverse_util.flatten_dict(default.get_config().to_dict(), sep=".")
# Two values of each type of tuple, as the command line gives them and as the config holds them.
VALUES = {
    str: (("('car','tree')", ("car", "tree")), ("('labeled',)", ("labeled",))),
    float: (("(0.5,)", (0.5,)), ("(1.0,2.0)", (1.0, 2.0))),
    int: (("(7,8,9)", (7, 8, 9)), ("(3,5)", (3, 5))),
}
TUPLE_KEYS = {
    key: VALUES.get(type(value[0]) if value else int, VALUES[int])
    for key, value in DEFAULTS.items()
    if isinstance(value, tuple)
}


def parsed(monkeypatch, *arguments):
    """Returns the config of a command line."""
    values = flags.FlagValues()
    argv = ["command", "--config=configs/streets.py", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    flags.DEFINE_string("flagfile", "", "Inserts flags.", flag_values=values)
    config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    cli.parse_flags_and_config(argv)
    return values.config


@pytest.mark.parametrize("key", TUPLE_KEYS)
def test_a_tuple_given_twice_is_replaced(monkeypatch, key):
    (first, _), (second, expected) = TUPLE_KEYS[key]
    given = (f"--config.{key}={first}", "--config.seed=3", f"--config.{key}={second}")
    config = parsed(monkeypatch, *given)
    assert traverse_util.flatten_dict(config.to_dict(), sep=".")[key] == expected
    assert config.seed == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config.data.crop", "(64,64)", "--config.data.crop", "(32,40)"),
        ("--config.data.crop=(64,64)", "-config.data.crop", "(32,40)"),
        ("--config.data.crop=(64,64)", "--config.data.mirror", "--config.data.crop=(32,40)"),
        ("--config.data.crop=(1,2)", "--config.data.crop=(3,4)", "--config.data.crop=(32,40)"),
        ("--config.data.crop=(64,64)", "--flagfile={file}"),
        ("--flagfile={file}",),
    ],
)
def test_each_form_of_a_flag(monkeypatch, tmp_path, arguments):
    (tmp_path / "flags").write_text("--config.data.crop=(5,6)\n--config.data.crop=(32,40)\n")
    arguments = [argument.format(file=tmp_path / "flags") for argument in arguments]
    config = parsed(monkeypatch, *arguments)
    assert config.data.crop == (32, 40) and config.data.mirror


def test_other_keys_take_the_last_value(monkeypatch):
    config = parsed(monkeypatch, "--config.seed=1", "--config.data.name=x", "--config.seed=-2")
    assert (config.seed, config.data.name) == (-2, "x")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252", "euc_kr"])
def test_lines_with_any_names_are_printed(encoding, monkeypatch):
    """Class names and file names; the bytes of a file name need not be UTF-8."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(cli, "_silence_checkpoint_threads", lambda: None)
    cli.start_command(["command"])
    names = (
        "[road]",
        "\u9053\u8def",
        "caf\u00e9",
        "\U0001f600",
        b"caf\xe9.png".decode(errors="surrogateescape"),
    )
    for name in names:
        logger.info(f"{name} ends here")
        print(f"{name} ends here")
    splits.print_report(splits.SplitReport(errors=[f"{n} ends here" for n in names]), RunConsole())
    output.flush()
    assert output.buffer.getvalue().count(b"ends here") == 3 * len(names)


def test_a_path_with_nul_is_refused():
    """A --flagfile may contain any character."""
    with pytest.raises(ValueError, match="NUL"):
        cli._PathParser().parse("a\0b")
