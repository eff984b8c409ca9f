"""Colours of the policies: eight hues that stay apart for every kind of colour vision, for light and for dark pages.

Chosen by search in OKLab: any two of them, and each and the baseline's neutral, are at least 0.09 apart in normal
vision and in simulations of protanopia, deuteranopia and tritanopia, with a contrast of 3 : 1 or more to the page.
A test holds them to it.
"""

LIGHT_PAGE = "#ffffff"
DARK_PAGE = "#14171c"
LIGHT = ("#23272f", "#0035a9", "#bc3b09", "#30846f", "#9557d9", "#b28e1a", "#1c9fb6", "#734367", "#792908")
"""Neutral for the baseline, then the hues in the order in which they are given out."""
DARK = ("#eceff4", "#3979d7", "#e1461c", "#2ddbab", "#c6a0fd", "#efd329", "#55afae", "#ac5b8b", "#e99431")
"""The same hues, in the same order, for a dark page."""


def colour_rules() -> str:
    """Custom properties ``--h0`` to ``--h8`` for a style sheet, light by default and on paper."""

    def block(colours: tuple[str, ...], page: str) -> str:
        return ":root{--page:" + page + ";" + "".join(f"--h{i}:{c};" for i, c in enumerate(colours)) + "}"

    dark = f"@media screen and (prefers-color-scheme:dark){{{block(DARK, DARK_PAGE)}}}"
    classes = "".join(f".h{index}{{--c:var(--h{index})}}" for index in range(len(LIGHT)))
    return block(LIGHT, LIGHT_PAGE) + dark + classes
