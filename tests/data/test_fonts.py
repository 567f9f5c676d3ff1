"""Class names of any script and any characters are drawn without boxes, or as codes."""

import io
import unicodedata

import numpy as np
import pytest
from etils import epath
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image
from rich.console import Console

from semiseg_jax import config_check, results
from semiseg_jax.data import fonts, splits, visualize
from semiseg_jax.reporting import plots
from semiseg_jax.runtime import metric_writer
from semiseg_jax.runtime.errors import printable
from semiseg_jax.runtime.logger import capture_lines
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.rows import result_row

SCRIPTS = {
    "accents": "Fußgänger ñ é",
    "Greek": "Ωδός",
    "Cyrillic": "машина",
    "Chinese": "車道 x",
    "Korean": "자동차",
    "Japanese": "くるま",
    "blanks": "a\u00a0b\u3000c",
    "control characters": "a\nb\tc\x1b[0m",
    "surrogate": "a\udce9",
}
MARKUP = (
    "[bold]",
    "[/]",
    "[/red]x",
    "a [b] c",
    "[link=x]",
    "\\[x]",
    "$\\foo$",
    "$x",
    "a/b",
    "<b>&",
    "{{x}}",
    "%s",
    "--",
)


def write_font(path, characters):
    """Writes a font with a triangle for each character."""
    names = [".notdef", *(f"u{ord(c):x}" for c in characters)]
    pen = TTGlyphPen(None)
    for point, draw in (((0, 0), pen.moveTo), ((500, 700), pen.lineTo), ((600, 0), pen.lineTo)):
        draw(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"u{ord(c):x}" for c in characters})
    empty = TTGlyphPen(None).glyph()
    builder.setupGlyf(
        {n: empty if n == ".notdef" else pen.glyph(dropImpliedOnCurves=False) for n in names}
    )
    builder.setupHorizontalMetrics(dict.fromkeys(names, (700, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture(params=["no further font", "a font of the script"])
def machine(request, tmp_path, monkeypatch):
    """A machine with and without a font for all scripts; returns the paths of its fonts."""
    paths = []
    if request.param == "a font of the script":
        characters = sorted({*"".join(SCRIPTS.values()), "…"} - set("\n\t\x1b\udce9"))
        write_font(tmp_path / "NotoTest-Regular.ttf", characters)
        paths.append(str(tmp_path / "NotoTest-Regular.ttf"))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    caches = (fonts._font_with, fonts._system_fonts, fonts._report_missing)
    for cache in (*caches, visualize._legend_entry, visualize._cached_words):
        cache.cache_clear()
    yield paths
    for cache in (*caches, visualize._legend_entry, visualize._cached_words):
        cache.cache_clear()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_character_that_is_drawn_has_a_glyph(machine, script):
    with capture_lines() as lines:
        text, font = fonts.choose(SCRIPTS[script], visualize._has_glyph)
    if font is None:
        assert all(visualize._has_glyph(c) for c in text)
    else:
        assert set(map(ord, text)) <= font_manager.get_font(font).get_charmap().keys()
    is_rare = script in ("Chinese", "Korean", "Japanese")
    assert bool(lines) == (is_rare and not machine)
    assert (text == SCRIPTS[script]) == (
        script in ("accents", "Greek", "Cyrillic") or (is_rare and bool(machine))
    )


@pytest.mark.parametrize("name", [*SCRIPTS.values(), *MARKUP])
def test_legends_and_plots_of_any_name(machine, name):
    visualize.legend([(name, (255, 0, 0)), (f"{name} 2", (0, 0, 0))], 120, [0.5, 0.5])
    with capture_lines():
        svg = plots.plot_confusion(np.eye(2, dtype=np.int64), (name, "other"))
    assert svg.startswith(b"<?xml")


def test_a_formula_is_shown_as_it_is_written():
    plain, formula = (
        plots.plot_confusion(np.eye(2, dtype=np.int64), (name, "other")) for name in ("xx", "$x$")
    )
    # One more glyph at each of the two axes.
    assert formula.count(b"<use") == plain.count(b"<use") + 2


def test_decomposed_accents_are_composed():
    text, _ = fonts.choose(unicodedata.normalize("NFD", "자동차 é"), lambda c: True)
    assert text == "자동차 é"


def test_latin_text_is_drawn_as_before():
    image = visualize.words("road 42 %…", 17)
    assert fonts.choose("road 42 %…", visualize._has_glyph) == ("road 42 %…", None)
    assert image.width > 50 and isinstance(image, Image.Image)


@pytest.mark.parametrize("name", MARKUP)
def test_tables_show_names_as_they_are(name):
    out = io.StringIO()
    console = Console(file=out, soft_wrap=True, width=100)
    row = result_row(iou=[0.5, 0.25])
    results.print_table([row], (name, "other"), console)
    report = splits.SplitReport(names=(name, "other"))
    report.classes["labeled"] = np.eye(256, dtype=np.int64)[0]
    splits.print_report(report, console)
    assert out.getvalue().count(name) == 2


def test_metrics_of_any_name_are_written(tmp_path):
    names = [n for n in (*SCRIPTS.values(), *MARKUP) if printable(n) == n]
    writer = metric_writer.MetricWriter(epath.Path(tmp_path), resume_step=0)
    writer.write_scalars(1, {f"iou/{name}": 0.5 for name in names})
    writer.close()
    (line,) = metric_writer.read_metrics(epath.Path(tmp_path))
    assert line == {"step": 1} | {f"iou/{name}": 0.5 for name in names}


def test_class_names_that_are_not_utf8_are_refused():
    config = tiny_config(data__classes=("ground", SCRIPTS["surrogate"]))
    with raises_code("config-value-invalid", "data.classes"):
        config_check.check(config)
