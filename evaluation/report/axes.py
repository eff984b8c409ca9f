"""Axes for small plots: ranges, round ticks, positions in percent, and labels that do not cover each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
SECOND_STEPS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)


@dataclass(frozen=True)
class Axis:
    """A linear axis with round ticks.

    Attributes:
        low: Value at 0 %.
        high: Value at 100 %.
        ticks: Round values inside.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def percent(self, value: float) -> float:
        """Where a value stands, in percent of the axis; values outside stand at its ends."""
        share = (value - self.low) / (self.high - self.low)
        return round(100.0 * min(max(share, 0.0), 1.0), 2)

    @property
    def tick_texts(self) -> list[str]:
        """The ticks, all with the decimals that tell them apart."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else self.high - self.low
        digits = max(0, -floor(log10(step) + 1e-9))
        digits += round(step * 10**digits, 6) != round(step * 10**digits)
        values = [0.0 if abs(tick) < step / 1e6 else tick for tick in self.ticks]
        return [f"{value:.{digits}f}".replace("-", "\u2212") for value in values]


def value_axis(
    values: Iterable[float],
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    include: Sequence[float] = (),
    num_ticks: int = 6,
) -> Axis:
    """An axis that holds all values with a little room, and no room beyond what the values can be.

    Args:
        values: What is drawn; at least one.
        bounds: Least and greatest possible value.
        include: Values that must be on the axis, such as zero.
        num_ticks: About how many ticks.

    Raises:
        ValueError: If there are no values.
    """
    known = [*values, *include]
    if not known:
        raise ValueError("an axis needs at least one value")
    low, high = min(known), max(known)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    least, greatest = bounds
    low = low - room if least is None or low < least else max(low - room, least)
    high = high + room if greatest is None or high > greatest else min(high + room, greatest)
    if low == high:
        low, high = low - room, high + room
    return Axis(low, high, _ticks(low, high, _round_step((high - low) / num_ticks)))


def seconds_axis(end: float, *, num_ticks: int = 8) -> Axis:
    """An axis of time from zero, with ticks at moments that people name."""
    step = next((step for step in SECOND_STEPS if end / step <= num_ticks), _round_step(end / num_ticks))
    return Axis(0.0, end, _ticks(0.0, end, step))


def clock(seconds: float, *, end: float) -> str:
    """A moment as text: seconds, or minutes and seconds where the axis is longer than three minutes."""
    if end <= 180:
        return f"{seconds:g}"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _round_step(step: float) -> float:
    unit = 10.0 ** floor(log10(step))
    return unit * next(nice for nice in STEPS if nice * unit >= step * 0.999)


def _ticks(low: float, high: float, step: float) -> tuple[float, ...]:
    first, last = ceil(low / step - 1e-6), floor(high / step + 1e-6)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def spread(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move labels apart so that each has its gap, as little as possible, inside a range.

    Args:
        positions: Where the labels would like to be.
        gap: Least distance between two.
        low: Least position.
        high: Greatest position.

    Returns:
        New positions in the order given; if there is no room for all gaps, even ones over the whole range.
    """
    count = len(positions)
    if count > 1 and gap * (count - 1) > high - low:
        gap = (high - low) / (count - 1)
    order = sorted(range(count), key=lambda index: positions[index])
    # Blocks of touching labels, each centred on where its members would like to be; blocks that touch are joined.
    blocks: list[list[float]] = []
    for index in order:
        blocks.append([min(max(positions[index], low), high), 1.0])
        while len(blocks) > 1 and _bottom(blocks[-2], gap) + gap > _top(blocks[-1], gap):
            (centre, size), (above, other) = blocks.pop(), blocks.pop()
            joined = (centre * size + above * other) / (size + other)
            half = gap * (size + other - 1) / 2
            blocks.append([min(max(joined, low + half), high - half), size + other])
    placed = [_top(block, gap) + gap * step for block in blocks for step in range(int(block[1]))]
    result = [0.0] * count
    for index, position in zip(order, placed, strict=True):
        result[index] = position
    return result


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def place_names(
    points: Sequence[tuple[float, float]], widths: Sequence[float], *, height: float, room: Box
) -> list[tuple[float, float, bool]]:
    """Put a name beside every point so that names cover neither each other nor points, where that can be had.

    Args:
        points: (x, y) of the points.
        widths: Of the names.
        height: Of a name.
        room: In which names should stay.

    Returns:
        (x, y, whether the name ends there instead of starting there) for each; y is its middle.
    """
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    result = []
    for (x, y), width in zip(points, widths, strict=True):
        spots = [
            (x + side * 10, y + step * height * 0.75, side < 0)
            for step in (0, -1, 1, -2, 2, -3, 3)
            for side in (1, -1)
        ]
        boxes = [_box(spot, width, height) for spot in spots]
        costs = [sum(_overlap(box, other) for other in taken) + 2 * _outside(box, room) for box in boxes]
        best = min(range(len(spots)), key=lambda index: (round(costs[index]), index))
        taken.append(boxes[best])
        result.append(spots[best])
    return result


def _box(spot: tuple[float, float, bool], width: float, height: float) -> Box:
    x, y, is_end = spot
    left = x - width if is_end else x
    return (left, y - height / 2, left + width, y + height / 2)


def _overlap(a: Box, b: Box) -> float:
    across, up = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * up if across > 0 and up > 0 else 0.0


def _outside(box: Box, room: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, room)


def _top(block: Sequence[float], gap: float) -> float:
    return block[0] - gap * (block[1] - 1) / 2


def _bottom(block: Sequence[float], gap: float) -> float:
    return block[0] + gap * (block[1] - 1) / 2
