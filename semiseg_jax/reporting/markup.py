"""Formats numbers, colours and images for the report's template."""

import base64
from collections.abc import Sequence
from typing import Any

# Variables of a section's template; "missing" is a sentence about missing data, or "".
Section = dict[str, Any]


def percent(share: float | None) -> str:
    """Formats a share in 0..1 as percent; None as a dash."""
    return "–" if share is None else f"{100 * share:.1f}"


def colour_code(colour: Sequence[int]) -> str:
    """Formats red, green and blue in 0..255 as a CSS colour, such as "#ff0000"."""
    return "#" + "".join(f"{channel:02x}" for channel in colour)


def data_uri(content: bytes, subtype: str) -> str:
    """Returns an image file as a data URI; `subtype` is that of its media type, such as "png"."""
    return f"data:image/{subtype};base64,{base64.b64encode(content).decode()}"
