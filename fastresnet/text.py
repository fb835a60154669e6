"""Text from outside, such as the names of classes, files and runs, where it could be taken for something else.

Each outlet has one function: `for_terminal` (HTML too), `for_figure`, `for_csv`, and for JSON `as_utf8`.
`fastresnet/console.py` prints all tables.
"""

from __future__ import annotations

import functools
import unicodedata

# OWASP, "CSV Injection": a spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def for_terminal(text: str) -> str:
    r"""Replace characters that are not printable by escapes such as `\x1b`, as `repr` does, except line ends.

    They are control characters, marks that turn the direction of writing, blanks other than the space, and the bytes
    of a file name that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def for_figure(name: str, width: int = 32) -> str:
    """Return `name` as matplotlib is to draw it: without formulas, in one line, with `…` in a name that is too long.

    `width` is in characters of usual width. Characters that no installed font can draw become escapes.
    """
    from rich.cells import cell_len

    name = for_terminal(name).replace("\n", r"\n")
    name = "".join(char if font_family(char) is not None else _escape(char) for char in name)
    if (drawn := cell_len(name)) > width:
        kept = int((width - 1) / 2 * len(name) / drawn)
        name = f"{name[:kept]}…{name[-kept:]}"
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves labels that begin with _ out of a legend


def for_csv(text: str) -> str:
    """Return `text` as a cell that a spreadsheet shows and does not calculate: after an apostrophe, if necessary.

    Control characters (not all readers accept them) and bytes that are not UTF-8 become escapes.
    """
    text = "".join(_escape(char) if unicodedata.category(char) in ("Cc", "Cs") else char for char in text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def as_utf8(text: str) -> str:
    r"""Replace the bytes of a file name that are not UTF-8 by escapes such as `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode()


def font_family(character: str) -> str | None:
    """Return the font that has `character`: empty for matplotlib's own choice, None if none is installed."""
    return "" if ord(character) in _own_characters() else _characters_of_other_fonts().get(ord(character))


@functools.cache
def _own_characters() -> frozenset[int]:
    from fastresnet.figures import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


@functools.cache
def _characters_of_other_fonts() -> dict[int, str]:
    """Map the characters of the other installed fonts to their names. Reads all fonts: only if one is missing."""
    from fastresnet.figures import fontManager, get_font

    families: dict[int, str] = {}
    for font in sorted(fontManager.ttflist, key=lambda font: font.name):
        boxes_only = font.name.replace(" ", "").startswith("LastResort")
        if (font.style, font.weight) == ("normal", 400) and not boxes_only:
            for code in get_font(font.fname).get_charmap():
                families.setdefault(code, font.name)
    return families


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
