"""Text that a font can draw: picks another font of the machine, or escapes characters."""

import functools
import os
import unicodedata
from collections.abc import Callable

from semiseg_jax.runtime.logger import logger


def choose(text: str, has_glyph: Callable[[str], bool]) -> tuple[str, str | None]:
    """Returns what to draw for a text, and the file of the font for it.

    A font without a glyph draws an empty box. If the default font lacks a glyph, the first font of
    the machine that has all of them is taken. If there is none, the missing characters are written
    as their codes, such as \\u8eca, as characters that do not print always are.

    Args:
        text: one line of text.
        has_glyph: whether the default font has a glyph for a character.

    Returns:
        The text, and the path of the font; None for the default font.
    """
    if text.isascii() and text.isprintable():
        return text, None
    # Two characters that form one are often drawn as two.
    text = unicodedata.normalize("NFC", text)
    text = "".join(map(_printable, text))
    missing = frozenset(c for c in text if not has_glyph(c))
    if not missing:
        return text, None
    font = _font_with(frozenset(text))
    if font is not None:
        return text, font
    _report_missing("".join(sorted(missing)))
    return "".join(_code(c) if c in missing else c for c in text), None


def _printable(character: str) -> str:
    """Returns a blank for any kind of blank, and the code of a character that does not print."""
    if unicodedata.category(character) == "Zs":
        return " "
    return character if character.isprintable() else _code(character)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


@functools.lru_cache(maxsize=1024)
def _font_with(characters: frozenset[str]) -> str | None:
    """Returns the first font of the machine that has a glyph for each of the characters."""
    codes = set(map(ord, characters))
    return next((path for path in _system_fonts() if codes <= _codes_of(path)), None)


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    """Returns the font files to look through.

    Matplotlib's own font is first, so that most pictures are equal on every machine; then the
    machine's, upright fonts of normal weight first.
    """
    # Imported here, because text in Latin letters needs none of it.
    from semiseg_jax.runtime.plain_matplotlib import font_manager, matplotlib

    def is_special(path: str) -> tuple[bool, str]:
        name = os.path.basename(path).lower()
        return any(word in name for word in ("bold", "italic", "oblique", "light", "black")), name

    own = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    paths = [own, *sorted(font_manager.findSystemFonts(), key=is_special)]
    # Last Resort has a box for every character.
    return tuple(p for p in paths if "lastresort" not in os.path.basename(p).lower())


@functools.cache
def _codes_of(path: str) -> frozenset[int]:
    """Returns the code points that a font has glyphs for; none if the file is not readable."""
    from semiseg_jax.runtime.plain_matplotlib import ft2font

    try:
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # A damaged font, or one of a kind that FreeType cannot read.
        return frozenset()


@functools.cache
def _report_missing(characters: str) -> None:
    """Logs once that pictures show codes in place of characters."""
    logger.warning(
        f"No font on this machine has {characters}: pictures show their codes; install a font that "
        "has them, such as Noto Sans CJK."
    )
