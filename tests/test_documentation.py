"""What is written holds: links, paths, keys and commands in the docs, and keys that are read."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from flax import traverse_util

from configs import default
from semiseg_jax.data import load, sda
from semiseg_jax.experiments import paper_tables
from semiseg_jax.methods import registry
from semiseg_jax.models import deeplab
from semiseg_jax.runtime import malloc, xla

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "semiseg_jax").rglob("*.py"))
KEYS = traverse_util.flatten_dict(default.get_config().to_dict(), sep=".")
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
# What configs and parts of them are called where they are read.
OWNERS = {"config", "_config", "knobs", "rates"}
# The configs that a reader writes, or that data.convert writes for one.
READERS_OWN = ("configs/mine.py", "data/mine/mine.py")
# Entries of magnitudes that have no low and high end.
NO_RANGE = {"seed", "lightness", "channels", "swap_red_blue", "permutation"}


def name(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """The lines of code blocks that call our programs or make; continuations joined."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^ {4,}\$? *((?:python -m semiseg_jax|make ).*)$", text, re.M):
        yield line.partition("   #")[0].strip()
    for block in code_blocks(page, "(?:sh|bash)"):
        yield from re.findall(r"^(?:python -m semiseg_jax|make ).*$", block, re.M)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    prose = re.sub(r"^ {4}.*$", "", page.read_text(), flags=re.M)  # code may call what it indexes
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_keys_that_are_named_are_there(page):
    quoted = re.findall(r"`([^`\n]+)`", page.read_text())
    files = [q for q in quoted if re.fullmatch(r"(semiseg_jax|configs|launch|tests)/[\w/.]+", q)]
    assert [f for f in files if f not in READERS_OWN and not (ROOT / f).exists()] == []
    keys = [q for q in quoted if re.fullmatch(rf"({'|'.join(SECTIONS)})\.[a-z_.]*[a-z_]", q)]
    known = {prefix for key in KEYS for prefix in (key, key.rpartition(".")[0])}
    assert [k for k in keys if k not in known and not k.endswith((".json", ".yaml"))] == []


@functools.cache
def flags_of(module):
    """The flags that a program's --help lists."""
    command = [sys.executable, "-m", module, "--help"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    assert said, f"{module} has no --help"
    return set(re.findall(r"^ +--(?:\[no\])?([\w-]+)", said, re.M)) | {"help", "verbosity"}


def check_command(line):
    program, *arguments = shlex.split(re.sub(r"\[([^\]]*)\]|…", r"\1", line))
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in targets, line
        return
    module, *arguments = arguments[1:]
    flags = flags_of(module)
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        flag, _, value = argument[2:].partition("=")
        if flag == "config" and value:
            path, _, chosen = value.partition(":")
            if path in READERS_OWN:
                continue
            assert (ROOT / path).exists(), line
            config = importlib.import_module(path[:-3].replace("/", "."))
            config.get_config(*([chosen] if chosen else []))
        elif flag.startswith("config."):
            assert any(k == flag[7:] or k.startswith(flag[7:]) for k in KEYS), line
        else:
            assert flag in flags or flag.replace("no", "", 1) in flags, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_programs_flags_and_configs_that_there_are(page):
    for line in commands(page):
        check_command(line)


# Their blocks train a network.
SLOW_PAGES = ("library",)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW_PAGES))
        for page in PAGES
        if code_blocks(page, "python")
    ],
    ids=name,
)
def test_snippets_run(page, tmp_path, monkeypatch, one_device, without_report):
    """The Python blocks of a page, one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))
    # Settings of the process, which has other tests to run.
    for module, setting in (
        (malloc, "disable_malloc_trim"),
        (xla, "force_cpu"),
        (xla, "enable_compilation_cache"),
    ):
        monkeypatch.setattr(module, setting, lambda *_: None)
    scope = {"__name__": "__snippet__"}
    with contextlib.ExitStack() as undone:
        # What a block adds there is gone for the other tests.
        for known in (sda.OPS, load.LAYOUTS, deeplab.BACKBONES, deeplab.USUAL_NORMALIZATIONS):
            undone.enter_context(mock.patch.dict(known))
        for block in code_blocks(page, "python"):
            exec(compile(block, str(page), "exec"), scope)


@functools.cache
def sentences():
    """Every text in the source on one line, with … for what is filled in."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [getattr(part, "value", None) for part in parts]
            if isinstance(node, ast.JoinedStr | ast.Constant):
                text = "".join(text if isinstance(text, str) else "…" for text in texts)
                found.append(" ".join(text.split()))
    for path in sorted((ROOT / "launch").glob("*.sh")):
        filled_in = r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+|%s"
        found += re.sub(filled_in, "…", path.read_text()).splitlines()
    return found


def messages(page):
    """What stands in backticks in the first column of tables of our messages, … for anything.

    Those of other programs stand in tables with another heading.
    """
    ours = False
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            ours = False
        elif line.startswith("| message |"):
            ours = True
        elif ours and not line.startswith("|-"):
            yield from re.findall(r"`([^`]+)`", re.match(r"\| (.*?) \|", line)[1])


WITH_MESSAGES = [page for page in PAGES if re.search(r"^\| message \|", page.read_text(), re.M)]


@pytest.mark.parametrize("page", WITH_MESSAGES, ids=name)
def test_messages_that_are_quoted_are_said(page):
    quoted = list(messages(page))
    assert quoted
    unsaid = []
    for message in quoted:
        pattern = ".*".join(map(re.escape, " ".join(message.split()).split("…")))
        if not any(re.search(pattern, sentence) for sentence in sentences()):
            unsaid.append(message)
    assert unsaid == []


def test_pages_with_messages():
    """None has fallen out of the test above by another heading."""
    assert {page.stem for page in WITH_MESSAGES} >= {
        "gpu_clusters",
        "tpu_pods",
        "troubleshooting",
    }


def rows(page):
    """The cells of the rows of a page's tables."""
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_what_the_method_names_is_defined_where_it_says():
    absent = []
    found = [row for row in rows("docs/method.md") if re.match("`semiseg_jax/.*py`$", row[-2])]
    assert found
    for *_, path, names in found:
        defined = set()
        for node in ast.parse((ROOT / path.strip("`")).read_text()).body:
            targets = [*getattr(node, "targets", ()), getattr(node, "target", node)]
            above = {getattr(t, "id", getattr(t, "name", "")) for t in targets}
            inside = {getattr(n, "name", "") for n in getattr(node, "body", ())}
            defined |= above | {f"{a}.{name}" for a in above for name in inside}
        absent += [f"{path} {n}" for n in re.findall("`(.*?)`", names) if n not in defined]
    assert absent == []


def test_ranges_of_the_operations_are_those_drawn_from():
    documented = {row[0].strip("`"): row[2:] for row in rows("docs/method.md") if len(row) == 4}
    for name, operation in sda.OPS.items():
        for magnitude, said in zip(("uniform", "released"), documented[name], strict=True):
            number = r"(-?\d+(?:\.\d+)?)"
            pairs = re.findall(rf"(\w+) {number}(?: to {number})?", said)
            ends = [operation.at_fraction(share, (0, 0), magnitude) for share in (0.0, 1.0)]
            assert ends[0].keys() - NO_RANGE == {key for key, *_ in pairs}, name
            for key, low, high in pairs:
                drawn = [np.ravel(end[key])[0] for end in ends]
                expected = [float(low), float(high or low)]
                np.testing.assert_allclose(drawn, expected, rtol=1e-6, err_msg=name)


def test_what_rows_of_the_papers_tables_change():
    documented = {row[0]: row[1] for row in rows("docs/paper.md") if row[0] in paper_tables.RUNS}
    assert documented.keys() == paper_tables.RUNS.keys()
    for name, run in paper_tables.RUNS.items():
        changes = dict(text.split("=", 1) for text in re.findall("`(.*?)`", documented[name]))
        assert changes == {k: str(v).replace(", ", ",") for k, v in run.changes.items()}, name


def test_every_key_is_read():
    read = set()
    for path in SOURCES:
        if path.name == "settings.py":  # it checks values; that alone would be no use of them
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                read.add((getattr(owner, "attr", getattr(owner, "id", "")), node.attr))
    # Those of a method are read by its class, all alike.
    of_methods = {
        f"method.{name}.{field.name}"
        for name, method in registry.METHODS.items()
        for field in dataclasses.fields(method)
    }
    unread = []
    for key in KEYS.keys() - of_methods:
        *above, leaf = key.split(".")
        section = above[-1] if above else "config"
        owners = OWNERS | {section, f"{section}_config"}
        if not any((owner, leaf) in read for owner in owners):
            unread.append(key)
    assert unread == []


def test_every_key_is_documented_where_it_is_declared():
    """A comment above it, or above others that are declared right before it."""
    lines = (ROOT / "configs/default.py").read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        if not re.match(r" +\w+(\.\w+)+ = (?!ConfigDict\(\)$)", line):
            continue
        above = number - 1
        while re.match(r" +\w+(\.\w+)+ = ", lines[above]):
            above -= 1
        if not re.match(r" +(#|\))", lines[above]):
            bare.append(line.strip())
    # The sections themselves, whose functions have docstrings.
    assert [b for b in bare if not re.fullmatch(r"(config|method)\.\w+ = \w+\(.*\)", b)] == []
