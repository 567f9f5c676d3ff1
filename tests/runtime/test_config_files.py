"""Shipped configs from any folder, a user's own configs, and what `configs` means in them."""

import itertools
import random
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import camvid, default, streets
from configs.methods import unimatch
from semiseg_jax import config_check
from semiseg_jax.data import split_lists, splits
from semiseg_jax.planning import workload
from semiseg_jax.runtime import cli, config_files
from semiseg_jax.runtime.errors import UserError
from tests.errors import raises_code

# ml_collections loads config files by a deprecated method.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
MINE = """
from configs import {base}

def get_config({argument}):
    config = {base}.get_config()
    config.seed = 77
    return config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, first on the path of imports as `python -m` has it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def parse(monkeypatch, *arguments):
    """Returns the config of a command line, and the path of its file."""
    values = flags.FlagValues()
    argv = ["command", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    flags.DEFINE_string("flagfile", "", "Inserts flags.", flag_values=values)
    config_flags.DEFINE_config_file("config", flag_values=values)
    with monkeypatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        cli.parse_flags_and_config(argv)
    return values.config, config_flags.get_config_filename(values["config"])


def refused(monkeypatch, *arguments):
    with pytest.raises(SystemExit) as end:
        parse(monkeypatch, *arguments)
    return end.value.code


# ---- the forms of a command line, beside other packages called configs

FORMS = {
    "equals": lambda value: [f"--config={value}"],
    "blank": lambda value: ["--config", value],
    "one dash": lambda value: [f"-config={value}"],
    "one dash, blank": lambda value: ["-config", value],
    "flagfile": lambda value: [f"--flagfile={write(Path('flags.txt'), f'--config={value}')}"],
    "replaced": lambda value: ["--config=pascal_voc", f"--config={value}"],
}
SURROUNDINGS = {
    "empty": {},
    "package": {"configs/__init__.py": "raise ValueError('foreign')"},
    "package with default": {"configs/__init__.py": "", "configs/default.py": "X = 1"},
    "module": {"configs.py": "raise ValueError('foreign')"},
    "folder": {"configs/notes.txt": "", "streets/notes.txt": ""},
}
SHIPPED = {
    "configs/streets.py": streets.get_config,
    "./configs/streets.py": streets.get_config,
    "configs/streets": streets.get_config,
    "streets.py": streets.get_config,
    "streets": streets.get_config,
    "configs/methods/unimatch.py": unimatch.get_config,
    "methods/unimatch:camvid": lambda: unimatch.get_config("camvid"),
    "configs/default.py": default.get_config,
    "configs/camvid.py:half": lambda: camvid.get_config("half"),
    "camvid:half,1_8": lambda: camvid.get_config("half,1_8"),
}


def shipped_file(value):
    """The path below configs/ of what a value of --config names."""
    path = Path(value.partition(":")[0]).with_suffix(".py")
    return path.relative_to("configs") if path.parts[0] == "configs" else path


def draws(count):
    """A sample of all combinations in which each value occurs."""
    combinations = [
        (value, form, around)
        for value, form, around in itertools.product(SHIPPED, FORMS, SURROUNDINGS)
        # A file of the working folder comes first.
        if value not in SURROUNDINGS[around]
    ]
    chosen = random.Random(0).sample(combinations, count)
    for position, values in enumerate((SHIPPED, FORMS, SURROUNDINGS)):
        assert {combination[position] for combination in chosen} == set(values)
    return chosen


@pytest.mark.parametrize(("value", "form", "around"), draws(40))
def test_shipped_configs_are_found_by_name(folder, monkeypatch, value, form, around):
    for name, text in SURROUNDINGS[around].items():
        write(folder / name, text)
    imported_before = sys.modules["configs"], sys.modules["configs.default"]
    config, path = parse(monkeypatch, *FORMS[form](value))
    assert config.to_dict() == SHIPPED[value]().to_dict()
    file = Path(path.partition(":")[0])
    assert file.samefile(ROOT / "configs" / shipped_file(value))
    assert (sys.modules["configs"], sys.modules["configs.default"]) == imported_before


def test_the_run_has_the_name_of_the_shipped_config(folder, monkeypatch):
    _, path = parse(monkeypatch, "--config=camvid:half")
    assert config_check.run_name(path) == "camvid_half"


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("place", ["mine.py", "experiments/mine.py", "{outside}/mine.py"])
@pytest.mark.parametrize("form", ["equals", "flagfile"])
def test_own_configs_start_from_the_shipped_ones(folder, monkeypatch, around, place, form):
    for name, text in SURROUNDINGS[around].items():
        write(folder / name, text)
    value = place.format(outside=folder.parent)
    write(Path(value), MINE.format(base="streets", argument="size"))
    config, path = parse(monkeypatch, *FORMS[form](f"{value}:half"))
    assert (config.seed, config.data.name) == (77, "streets")
    assert path == f"{value}:half"


def test_a_path_below_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    write(folder.parent / "mine.py", MINE.format(base="default", argument=""))
    for form in FORMS.values():
        assert parse(monkeypatch, *form("~/mine.py"))[1] == str(folder.parent / "mine.py")


# ---- configs in a folder called configs


@pytest.mark.parametrize("is_package", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_own_configs_in_a_folder_configs(folder, monkeypatch, is_package, relative):
    """They import the shipped ones, and each other; the folder need not be the working folder's."""
    project = folder if relative else folder.parent / "project"
    write(project / "configs/base.py", MINE.format(base="camvid", argument="size"))
    mine = write(
        project / "configs/mine.py",
        "from configs import base, default\n"
        "import configs.parts.numbers as numbers\n"
        "def get_config():\n"
        "    config = base.get_config('half')\n"
        "    config.train.steps = numbers.STEPS\n"
        "    assert default.get_config().keys() == config.keys()\n"
        "    return config\n",
    )
    write(project / "configs/parts/numbers.py", "STEPS = 5")
    if is_package:
        write(project / "configs/__init__.py", "from configs import default\nNAME = 1")
        mine.write_text(f"from configs import NAME\n{mine.read_text()}")
    config, _ = parse(monkeypatch, f"--config={'configs/mine.py' if relative else mine}")
    assert (config.seed, config.train.steps, config.data.name) == (77, 5, "camvid")


def test_an_own_file_precedes_a_shipped_one_of_its_name(folder, monkeypatch):
    for name in ("configs/streets.py", "camvid.py"):
        write(folder / name, MINE.format(base="folder", argument=""))
    for value in ("configs/streets.py", "camvid.py"):
        config, path = parse(monkeypatch, f"--config={value}")
        assert (config.seed, config.data.name, path) == (77, "folder", value)


def test_own_base_precedes_a_shipped_one_beside_the_config(folder, monkeypatch):
    """A copy of the shipped configs, changed."""
    write(folder / "configs/default.py", (ROOT / "configs/default.py").read_text() + "\nOWN = 3\n")
    write(
        folder / "configs/mine.py",
        "from configs import default\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.seed = default.OWN\n"
        "    return config\n",
    )
    assert parse(monkeypatch, "--config=configs/mine.py")[0].seed == 3


def test_another_package_of_the_name_is_importable_too(folder, monkeypatch):
    """A config file may use a library of the user that has a package of the same name."""
    write(folder / "configs/__init__.py")
    write(folder / "configs/constants.py", "SEED = 5")
    write(folder / "library.py", "from configs.constants import SEED")
    source = MINE.format(base="default", argument="").replace("77", "library.SEED")
    write(folder / "experiments/mine.py", f"import library\n{source}")
    monkeypatch.delitem(sys.modules, "library", raising=False)
    assert parse(monkeypatch, "--config=experiments/mine.py")[0].seed == 5


def test_imports_are_as_before_after_an_error(folder, monkeypatch):
    write(folder / "mine.py", "from configs import streets, nothing")
    path, modules = list(sys.meta_path), {n for n in sys.modules if n.startswith("configs")}
    message = refused(monkeypatch, "--config=mine.py")
    assert "mine.py raises ImportError: cannot import name 'nothing'" in message
    assert sys.meta_path == path
    assert {n for n in sys.modules if n.startswith("configs")} == modules


# ---- files that are missing


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("configs/stretes.py", "is missing (did you mean configs/streets.py?)"),
        ("cityscape:1_8", "is missing (did you mean configs/cityscapes.py"),
        ("configs/mien.py", "is missing (did you mean configs/mine.py?)"),
        ("/nowhere/streets.py", "is missing (did you mean configs/streets.py?)"),
        ("xyz.py", "is missing: give"),
        ("configs", "is a folder"),
        ("configs/splits", "is missing"),
        ("configs/__init__", "is missing"),
        ("a\0b", "is missing"),
        ("x" * 5000, "is missing"),
    ],
)
@pytest.mark.parametrize("form", ["equals", "blank"])
def test_a_missing_config_names_those_there_are(folder, monkeypatch, value, problem, form):
    write(folder / "configs/mine.py")
    message = refused(monkeypatch, *FORMS[form](value))
    assert message.startswith("Error: The config ") and problem in message
    for name in ("streets", "camvid", "cityscapes", "folder", "pascal_voc", "default"):
        assert name in message.partition("shipped")[2]


def test_messages_name_the_file_of_the_keys(folder, monkeypatch):
    """From the root of the repository by its path there, elsewhere by its whole path."""
    write(folder / "configs/default.py", "X = 1")
    message = refused(monkeypatch, "--config=streets", "--config.train.xyzzy=1")
    assert f"no config key xyzzy: {ROOT / 'configs/default.py'} has every key" in message
    monkeypatch.chdir(ROOT)
    message = refused(monkeypatch, "--config=streets", "--config.train.xyzzy=1")
    assert "no config key xyzzy: configs/default.py has every key" in message


# ---- without a command line


def test_configs_are_loaded_without_a_command_line(folder):
    write(folder / "configs/default.py", "X = 1")
    assert config_files.load("camvid:half").to_dict() == camvid.get_config("half").to_dict()
    assert config_files.load("configs/streets.py").to_dict() == streets.get_config().to_dict()
    assert config_files.default_config().to_dict() == default.get_config().to_dict()
    write(folder / "mine.py", MINE.format(base="folder", argument=""))
    assert config_files.load("mine.py").seed == 77
    with raises_code("config-file-missing", "did you mean mine.py"):
        config_files.load("mien.py")


# ---- split lists


def test_shipped_lists_are_found_from_any_folder(folder, monkeypatch):
    for share, count in (("1_30", 12), ("1_2", 184)):
        config = camvid.get_config(share)
        assert workload._count_listed(config.data.labeled_list) == count
        found = config_files.find_list(f"./{config.data.labeled_list}")
        assert len(split_lists.read_list(found)) == count
    report = splits.examine_lists({"labeled": "configs/splits/camvid/1_30.txt"})
    assert report.sizes == {"labeled": 12} and not report.errors
    own = write(folder / "configs/splits/camvid/1_30.txt", "one.png\n")
    assert config_files.find_list("configs/splits/camvid/1_30.txt") == str(own.relative_to(folder))


@pytest.mark.parametrize(
    "name", ["", "configs", "configs/splits", "configs/none.txt", "/configs/default.py", "a\0b"]
)
def test_other_lists_are_left_as_they_are(folder, name):
    assert config_files.find_list(name) == name
    if name:
        report = splits.examine_lists({"labeled": name})
        assert report.errors
    with pytest.raises(UserError):
        split_lists.read_list(name or "none")
