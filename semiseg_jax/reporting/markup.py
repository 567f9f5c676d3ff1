"""How figures, colours and pictures are written into the page."""

import base64
from collections.abc import Sequence
from typing import Any

# What the template shows of a section: "missing", a sentence or "", and what else it names.
Section = dict[str, Any]


def percent(share: float | None) -> str:
    """Of a share in 0..1; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def colour_code(colour: Sequence[int]) -> str:
    """Of red, green and blue in 0..255, such as "#ff0000"."""
    return "#" + "".join(f"{channel:02x}" for channel in colour)


def data_uri(content: bytes, kind: str) -> str:
    """The file of an image inside its address; `kind` is the latter part of its media type."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
