"""The glyphs of the DejaVu fonts that ship with matplotlib, as small grey pictures.

A good stand-in for private data: thousands of distinct shapes with classes, found wherever matplotlib is.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

# Block groups rather than `unicodedata` names: those grow with each Python version, and with them the labels.
_BLOCKS: tuple[tuple[int, int, str], ...] = (
    (0x0000, 0x02FF, "latin"),
    (0x0370, 0x03FF, "greek"),
    (0x0400, 0x052F, "cyrillic"),
    (0x0590, 0x05FF, "hebrew"),
    (0x0600, 0x077F, "arabic"),
    (0x1400, 0x167F, "canadian"),
    (0x1D00, 0x1EFF, "latin"),
    (0x1F00, 0x1FFF, "greek"),
    (0x2190, 0x21FF, "arrows"),
    (0x2200, 0x22FF, "maths"),
    (0x2500, 0x25FF, "shapes"),
    (0x27C0, 0x27EF, "maths"),
    (0x27F0, 0x27FF, "arrows"),
    (0x2800, 0x28FF, "braille"),
    (0x2900, 0x297F, "arrows"),
    (0x2980, 0x2AFF, "maths"),
    (0x2B00, 0x2BFF, "arrows"),
    (0x2C60, 0x2C7F, "latin"),
    (0x2DE0, 0x2DFF, "cyrillic"),
    (0xA640, 0xA69F, "cyrillic"),
    (0xA720, 0xA7FF, "latin"),
    (0xFB00, 0xFB06, "latin"),
    (0xFB1D, 0xFB4F, "hebrew"),
    (0xFB50, 0xFDFF, "arabic"),
    (0xFE70, 0xFEFF, "arabic"),
)
_SCRIPT, _SYMBOL = "other-script", "symbols"  # whatever is in no block above, below and from U+2000 on

CLASSES: tuple[str, ...] = (*sorted({name for _, _, name in _BLOCKS}), _SCRIPT, _SYMBOL)
"""Class names; the label of a glyph is the position of its name here."""

_FONTS: tuple[tuple[str, frozenset[str]], ...] = (
    ("DejaVuSans.ttf", frozenset(CLASSES)),
    # A second face of two scripts, so that near-twins exist, as they do in real collections.
    ("DejaVuSerif.ttf", frozenset({"greek", "cyrillic"})),
)


def block_group(code_point: int) -> str:
    """The class name of a Unicode code point."""
    for first, last, name in _BLOCKS:
        if first <= code_point <= last:
            return name
    return _SCRIPT if code_point < 0x2000 else _SYMBOL


def render_glyphs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Every distinct glyph: uint8 [N, 1, side, side], white on black, and its class int64 [N].

    Blank glyphs, the font's "not defined" box and pictures that were there already are left out, so that no two
    images are equal (Latin, Greek and Cyrillic A are one image, of class latin).
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    seen: dict[bytes, int] = {}
    for name, wanted in _FONTS:
        draw = partial(_draw, folder / name, side, {})
        undefined = draw("\uffff")
        for code_point in sorted(FT2Font(str(folder / name)).get_charmap()):
            group = block_group(code_point)
            if group not in wanted:
                continue
            pixels = draw(chr(code_point))
            if any(pixels) and pixels != undefined:
                seen.setdefault(pixels, CLASSES.index(group))
    images = np.frombuffer(b"".join(seen), dtype=np.uint8).reshape(-1, 1, side, side)
    return images, np.fromiter(seen.values(), dtype=np.int64)


def _draw(path: Path, side: int, fonts: dict[int, ImageFont.FreeTypeFont], character: str) -> bytes:
    """The character centred on the baseline as side*side grey bytes, moved and, if need be, shrunk to fit."""
    # A 14-point font fills 16 pixels; the basic layout gives the same pixels with and without libraqm.
    for size in range(round(side * 14 / 16), 0, -1):
        if size not in fonts:
            fonts[size] = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = map(round, fonts[size].getbbox(character, anchor="ls"))
        if right - left <= side and bottom - top <= side:
            break
    x = (side - (right - left)) // 2 - left
    y = min(max(round(side * 12 / 16), -top), side - bottom)
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).text((x, y), character, fill=255, font=fonts[size], anchor="ls")
    return image.tobytes()
