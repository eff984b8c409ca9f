"""HTML that is escaped by construction: text becomes markup only through :func:`tag`, which escapes it."""

import html
import re
from typing import Any

BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn round the text that follows, on a page that is not theirs."""
VOID = frozenset({"br", "circle", "col", "hr", "img", "input", "line", "link", "meta", "path", "rect", "use", "wbr"})
"""Elements without content. SVG's shapes are among them: they are written ``<path .../>``."""


class Markup(str):
    """Text that is HTML already; anything else is escaped where it is put into an element."""

    __slots__ = ()


Content = Any
"""What an element may hold: text, markup, numbers, None, or any nesting of iterables of these."""


def escape(text: object) -> Markup:
    """Text as HTML shows it, quotes included, without characters that no page may hold."""
    whole = str(text).encode("utf-8", "replace").decode("utf-8")
    shown = (character for character in whole if character >= " " or character in "\n\t")
    plain = "".join(character for character in shown if character not in BIDI_CONTROLS)
    return Markup(html.escape(plain, quote=True))


def join(*content: Content) -> Markup:
    """Put contents one behind the other; what is not :class:`Markup` is escaped."""
    parts: list[str] = []
    for item in content:
        if item is None:
            continue
        if isinstance(item, Markup):
            parts.append(item)
        elif isinstance(item, str | int | float):
            parts.append(escape(item))
        else:
            parts.append(join(*item))
    return Markup("".join(parts))


def breakable(text: str) -> Markup:
    """A long name that may be broken where its parts meet."""
    return Markup(re.sub(r"(?<=[_/+=,])(?=[A-Za-z0-9])|(?=\[)", "<wbr/>", escape(text)))


def tag(name: str, /, *content: Content, **attributes: object) -> Markup:
    """An element.

    Args:
        name: E.g. ``td``.
        content: Text (escaped), markup, numbers, or iterables of these; None is left out.
        attributes: ``class_`` is written ``class`` and ``data_run`` ``data-run``; True writes the bare name, False and
            None leave it out.

    Raises:
        ValueError: If an element that can hold nothing is given content.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written = key.rstrip("_").replace("_", "-")
        words.append(written if value is True else f'{written}="{escape(value)}"')
    if name in VOID:
        if content:
            raise ValueError(f"<{name}> can hold nothing, and was given {content!r}")
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{join(*content)}</{name}>")
