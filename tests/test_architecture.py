"""The structure of the package, and docs/architecture.md, which describes it."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "semiseg_jax"
PAGE = ROOT / "docs" / "architecture.md"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_TOP_FILES = 31
MAX_PRIVATE_JAX_IMPORTS = 1
# Names of services that the logger and the stop flag replaced.
REPLACED_PARAMETERS = {"say", "asked"}


def parse(name):
    return ast.parse(SOURCES[name].read_text(), name)


def section(title):
    """The text of the page below a heading of level 2."""
    (text,) = re.findall(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S
    )
    return text


def table_rows(text):
    """The cells of the rows of a Markdown table, without its head."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def routes():
    """(file, function) of each stop, by the heading of its route."""
    titles = re.findall(r"^## (Route .*)$", PAGE.read_text(), re.M)
    return {
        title: [
            (row[1].strip("`").removeprefix("semiseg_jax/"), row[2].strip("`"))
            for row in table_rows(section(title))
        ]
        for title in titles
    }


def definitions(tree, prefix=""):
    """Names of the functions and methods of a module, such as "run" and "Predictor._logits"."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")


# ---- the page


def test_the_page_has_three_routes():
    assert len(routes()) == 3
    for title, stops in routes().items():
        assert len(stops) > 5, title


def test_each_stop_of_a_route_exists():
    functions = {name: set(definitions(parse(name))) for name in SOURCES}
    missing = [
        f"{title}: {file} | {function}"
        for title, stops in routes().items()
        for file, function in stops
        if function not in functions.get(file, ())
    ]
    assert not missing


def test_no_route_visits_a_stop_twice():
    repeated = [
        f"{title}: {file} | {function}"
        for title, stops in routes().items()
        for file, function in set(stops)
        if stops.count((file, function)) > 1
    ]
    assert not repeated


def test_stops_are_numbered_in_order():
    for title in routes():
        numbers = [row[0] for row in table_rows(section(title))]
        assert numbers == [str(i) for i in range(1, len(numbers) + 1)], title


def test_the_tree_of_the_page_is_the_tree_of_the_package():
    listed = re.findall(r"^    (\S+)  +\S", section("The tree"), re.M)
    files = {name for name in SOURCES if "/" not in name and name != "__init__.py"}
    packages = {
        f"{path.parent.relative_to(PACKAGE).as_posix()}/"
        for path in PACKAGE.glob("*/**/__init__.py")
    }
    assert sorted((files | packages) - set(listed)) == [], "not on the page"
    assert sorted(set(listed) - (files | packages)) == [], "not in the package"
    assert sorted(name for name in listed if listed.count(name) > 1) == [], "listed twice"


def test_the_layers_of_the_page_are_those_of_pyproject():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    layers = [sorted(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    described = [
        sorted(re.findall(r"`(\w+)`", modules)) for _, modules, _ in table_rows(section("Layers"))
    ]
    assert described == layers


# ---- the package


def test_few_files_at_the_top():
    files = [name for name in SOURCES if "/" not in name]
    assert len(files) <= MAX_TOP_FILES, files


def module_name(name):
    return f"semiseg_jax/{name}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(name, modules):
    """The modules of the package that a module imports, at its top or inside a function."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}, line {node.lineno}: a relative import"
            # `from package import module` imports the module, `from module import name` that one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [full if full in modules else node.module for full in names]
        else:
            continue
        yield from (target for target in targets if target in modules)


def strongly_connected(graph):
    """The strongly connected components of a graph {node: successors} (Tarjan, 1972)."""
    indices, lows, stack, components = {}, {}, [], []

    def visit(node):
        indices[node] = lows[node] = len(indices)
        stack.append(node)
        for successor in graph[node]:
            if successor not in indices:
                visit(successor)
                lows[node] = min(lows[node], lows[successor])
            elif successor in stack:
                lows[node] = min(lows[node], indices[successor])
        if lows[node] == indices[node]:
            start = stack.index(node)
            components.append(sorted(stack[start:]))
            del stack[start:]

    for node in graph:
        if node not in indices:
            visit(node)
    return components


@pytest.mark.parametrize(
    ("graph", "circles"),
    [
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": []}, [["a", "b", "c"]]),
        ({"a": ["b"], "b": ["a", "c"], "c": ["d"], "d": ["c"]}, [["c", "d"], ["a", "b"]]),
    ],
)
def test_circles_are_found(graph, circles):
    assert [c for c in strongly_connected(graph) if len(c) > 1] == circles


def test_no_import_circle():
    modules = {module_name(name): name for name in SOURCES}
    graph = {
        module: sorted(set(imported_modules(name, modules)) - {module})
        for module, name in modules.items()
    }
    # A guard: the walk finds imports at the top of a module and inside a function.
    assert "semiseg_jax.stages" in graph["semiseg_jax.self_training"]
    assert "semiseg_jax.self_training" in graph["semiseg_jax.main"]
    circles = [
        {module: [m for m in graph[module] if m in component] for module in component}
        for component in strongly_connected(graph)
        if len(component) > 1
    ]
    assert not circles


def test_private_modules_of_jax_are_imported_once_with_a_reason():
    imports = [
        (f"{name}, line {number}: {line.strip()}", line, lines[number - 2])
        for name, path in SOURCES.items()
        for lines in [path.read_text().splitlines()]
        for number, line in enumerate(lines, start=1)
        if re.search(r"\b(?:import|from)\b.*\bjax\._src\b", line)
    ]
    assert len(imports) <= MAX_PRIVATE_JAX_IMPORTS, [where for where, *_ in imports]
    for where, line, line_before in imports:
        assert "# " in line or line_before.strip().startswith("# "), f"{where}: give the reason"


def test_no_parameter_carries_the_logger_or_the_stop_flag():
    found = [
        f"{name}, line {node.lineno}: {argument.arg}"
        for name in SOURCES
        for node in ast.walk(parse(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for argument in ast.walk(node.args)
        if isinstance(argument, ast.arg) and argument.arg in REPLACED_PARAMETERS
    ]
    assert not found
