"""A bar chart as SVG: the rates of all sides, case by case.

Each case has a scale of its own, as long as its longest bar: rates of different cases say nothing about each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from benchmarks.case import Figure, shown

_WIDTH = 860
_MARGIN = 16
_LABEL_WIDTH = 260
_VALUE_WIDTH = 90
_BAR_HEIGHT = 16
_TITLE_HEIGHT = 28
_SUBJECT_COLOUR = "#2da44e"
_OTHER_COLOUR = "#8c959f"
_TEXT_COLOUR = "#57606a"


def draw(figures: Sequence[Figure], titles: Mapping[str, str]) -> str:
    """The picture of all figures whose metric is the rate."""
    groups: dict[str, list[Figure]] = {}
    for figure in figures:
        if figure.metric == "rate":
            groups.setdefault(figure.case, []).append(figure)
    parts: list[str] = []
    top = _MARGIN
    for case, sides in groups.items():
        top += _TITLE_HEIGHT
        parts.append(_text(_MARGIN, top - 8, f"{titles[case]}, jobs/s", weight="bold"))
        longest = max(figure.value for figure in sides)
        for figure in sides:
            parts.append(_bar(figure, top, figure.value / longest))
            top += _BAR_HEIGHT + 2
    height = top + _MARGIN
    size = f'width="{_WIDTH}" height="{height}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect {size} fill="white"/>', *parts, "</svg>", ""])


def _bar(figure: Figure, top: int, share: float) -> str:
    width = max(share * (_WIDTH - 2 * _MARGIN - _LABEL_WIDTH - _VALUE_WIDTH), 1)
    left = _MARGIN + _LABEL_WIDTH
    colour = _SUBJECT_COLOUR if figure.ratio is None else _OTHER_COLOUR
    baseline = top + _BAR_HEIGHT - 4
    return "\n".join(
        [
            _text(left - 8, baseline, figure.side, anchor="end"),
            f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{_BAR_HEIGHT}" fill="{colour}"/>',
            _text(left + width + 6, baseline, shown("rate", figure.value)),
        ]
    )


def _text(x: float, y: float, text: str, *, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}" fill="{_TEXT_COLOUR}">'
        f"{escape(text)}</text>"
    )
