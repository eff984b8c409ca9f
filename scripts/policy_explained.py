"""Facts of cache policies and pictures of what their blocks read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.text import Text

from longtake.cache import CachePolicy, Event, Geometry, make_policy
from longtake.cache.simulation import PassRecord, SimulatedBlock, Span, simulate
from longtake.configs.loader import load_preset, preset_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRAMES_PER_SECOND = 4  # latent ones, at 16 pixel frames a second
SETTLED_BLOCKS = 12  # as many as change nothing, and a policy is taken to be in its steady state
MOST_BLOCKS = 720  # then it is taken to grow for ever: 9 minutes in blocks of 3
MINUTE = 60
REFERENCE = re.compile(r"arXiv:[0-9.]+[0-9]")


@dataclass(frozen=True)
class _PolicyFacts:
    """What the table of policies says of one.

    Attributes:
        context_frames: Most that a block or window attends to, itself included, in frames' worth of tokens.
        context_tokens: The same in tokens.
        attended_bytes: Keys and values that it attends to beside itself.
        stored_bytes: Keys and values that are kept between blocks.
        grows: Bytes per minute of video that are still added to what is stored; 0: bounded.
        after_seconds: Length of video at which these are the figures, or from which on they hold.
    """

    context_frames: float
    context_tokens: int
    attended_bytes: int
    stored_bytes: int
    grows: float
    after_seconds: float

    @property
    def is_bounded(self) -> bool:
        """Whether memory stays the same however long the video."""
        return not self.grows


def wan_1_3b(frames_per_block: int = 3) -> Geometry:
    """Wan2.1-T2V-1.3B at 832x480 in bfloat16: 30 layers, 12 heads of 128, 1,560 tokens a frame; sizes alone."""
    return Geometry(
        num_layers=30,
        num_heads=12,
        head_dim=128,
        num_rows=30,
        num_columns=52,
        frames_per_block=frames_per_block,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )


def preset_policy(name: str) -> CachePolicy:
    """A policy as its preset has it.

    Raises:
        ValueError: If the preset cannot stand alone: a policy that needs a file of the user's, say.
    """
    return make_policy(load_preset("cache", name) if name in preset_names("cache") else name)


def summary(cls: type[CachePolicy]) -> str:
    """First paragraph of a policy's docstring, and its source unless the paragraph names it already."""
    first = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
    references = REFERENCE.findall(cls.source) or [cls.source]
    return first if all(reference in first for reference in references) else f"{first} Source: {cls.source}."


def needs(policy: CachePolicy) -> str:
    """What it needs beside the model: weights or a VAE."""
    wanted = {"VAE": policy.traits.needs_vae, "weights": policy.traits.needs_weights}
    return ", ".join(name for name, is_needed in wanted.items() if is_needed) or "-"


def events(policy: CachePolicy) -> list[Event]:
    """Prompt events that it knows, the trivial one left out."""
    return sorted(policy.events - {"keep"})


@cache
def facts(policy: CachePolicy, geometry: Geometry | None = None) -> _PolicyFacts:
    """Play a policy until nothing changes any more, or for a minute if that never comes.

    One layer is played for all: policies that treat layers differently keep as much in each of them, or refuse a
    model of one layer, and then all are played.

    Args:
        policy: What to measure.
        geometry: Shapes; ``wan_1_3b`` with the source's block size unless given.

    Raises:
        ValueError: If the policy has no room for the geometry's blocks, or what it needs is made for another model.
    """
    try:
        return _measured(policy, geometry)
    except RuntimeError as error:
        raise ValueError(f"what {policy.name} needs is made for a model of other shapes ({error}).") from error


def _measured(policy: CachePolicy, geometry: Geometry | None) -> _PolicyFacts:
    g = geometry or wan_1_3b(policy.published_block)
    played = replace(g, num_layers=1)
    try:
        policy.start(played)
    except ValueError:
        played = g
    attended, stored, steady = 0.0, 0, 0
    is_bounded = True
    for block in simulate(policy, played, MOST_BLOCKS, window_blocks=policy.published_window):
        now_attended, now_stored = block.denoise.num_tokens, block.stats.num_bytes
        if now_attended > attended or now_stored > stored:
            attended, stored, steady = max(attended, now_attended), max(stored, now_stored), block.index
        is_bounded = block.denoise.is_bounded or not block.denoise.spans
        seconds = _seconds(block)
        is_settled = block.index >= steady + SETTLED_BLOCKS
        if is_settled or (not is_bounded and seconds >= MINUTE):
            break
    stored = stored * g.num_layers // played.num_layers
    grows = 0.0 if is_settled else stored / seconds * MINUTE
    token_bytes = 2 * g.num_layers * g.num_heads * g.head_dim * g.dtype.itemsize * g.batch_size
    context = round(attended) + policy.published_window * g.frames_per_block * g.tokens_per_frame
    return _PolicyFacts(
        context_frames=context / g.tokens_per_frame,
        context_tokens=context,
        attended_bytes=round(attended * token_bytes),
        stored_bytes=stored,
        grows=grows,
        after_seconds=(steady + 1) * g.frames_per_block / FRAMES_PER_SECOND if is_settled else seconds,
    )


def _seconds(block: SimulatedBlock) -> float:
    return (block.start_frame + block.num_frames) / FRAMES_PER_SECOND


BLOCK = "block"
TOY_CHANNELS = 12  # of the bundled model's latents
COLOURS = {"sink": "#3f78c4", "recent": "#5aa872", "mid": "#e5994b", "memory": "#9a6fc0", BLOCK: "#3a3f4b"}
EVENT_COLOUR = "#c0392b"
ROW_HEIGHT = 0.84
OTHER_COLOURS = ("#d1605e", "#4bb3b8", "#c9b23c", "#b0728f", "#7d8f4e", "#8c8c8c")
TEXT_FRAMES = 60  # most columns of the text picture; more frames share a column
LABELLED_FRAMES = 45  # more, and numbers would not be readable
WHOLE = 0.99  # a frame of which so much is read is read
MAX_LISTED = 3  # runs of numbers before a list is shortened


def _toy_geometry(frames_per_block: int = 3) -> Geometry:
    """The bundled model's shapes: 6 layers, 6 heads of 32, 4 x 4 tokens a frame."""
    return Geometry(
        num_layers=6,
        num_heads=6,
        head_dim=32,
        num_rows=4,
        num_columns=4,
        frames_per_block=frames_per_block,
        dtype=torch.float32,
    )


def play(
    policy: CachePolicy,
    *,
    num_blocks: int = 12,
    frames_per_block: int = 3,
    events: Mapping[int, Event] | None = None,
    layer: int = -1,
) -> list[SimulatedBlock]:
    """Play a rollout of the bundled model's shapes, and note what one layer reads.

    Raises:
        ValueError: If the policy does not know an event, has no room for such blocks, or there is no such layer.
    """
    geometry, window = _toy_geometry(frames_per_block), policy.published_window
    if not -geometry.num_layers <= layer < geometry.num_layers:
        raise ValueError(f"layer={layer} does not exist: the model played has layers 0 to {geometry.num_layers - 1}.")
    settings = {"window_blocks": window, "latent_channels": TOY_CHANNELS, "layer": layer}
    return list(simulate(policy, geometry, num_blocks, events=events, **settings))


def roles(blocks: Sequence[SimulatedBlock]) -> dict[str, str]:
    """Colours by role, in order of appearance; the block itself is last."""
    found: dict[str, str] = {}
    others = iter(OTHER_COLOURS * 3)
    for record in (record for block in blocks for record in (block.denoise, *block.jobs)):
        for span in record.spans:
            if span.role not in found:
                found[span.role] = COLOURS.get(span.role) or next(others)
    return found | {BLOCK: COLOURS[BLOCK]}


def numbers(values: Sequence[float]) -> str:
    """Write numbers as ranges: 0-2, 6, 8-11; more than three ranges as first to last."""
    runs: list[list[float]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        elif not runs or value != runs[-1][1]:
            runs.append([value, value])
    if len(runs) > MAX_LISTED:
        return f"{runs[0][0]:g}..{runs[-1][1]:g}"
    return ", ".join(f"{first:g}" if first == last else f"{first:g}-{last:g}" for first, last in runs)


def lines(blocks: Sequence[SimulatedBlock]) -> Iterator[Text]:
    """A line per block: a strip of its frames, one letter each, and what is read at which positions.

    Capital letters are whole frames, small ones part of a frame's tokens, ``#`` the block itself.
    """
    colours = roles(blocks)
    total = _num_frames(blocks)
    per_column = -(-total // TEXT_FRAMES)
    width = -(-total // per_column)
    title = "frames" if per_column == 1 else f"frames, {per_column} to a letter"
    yield Text(f"block  {title:<{width}}  reads @ positions", style="bold")
    for block in blocks:
        if block.event != "keep":
            yield Text(f"       new prompt: {block.event}", style="bold red")
        yield _line(f"{block.index:5d}", block.denoise, colours, width, per_column)
        if block.commit is not None:
            yield _line(" keep", block.commit, colours, width, per_column, is_faint=True)
        for job in block.jobs:
            yield _line(" job ", job, colours, width, per_column, is_faint=True)


def legend(blocks: Sequence[SimulatedBlock]) -> Text:
    """Which letter is which role."""
    text = Text("")
    for role, colour in roles(blocks).items():
        text.append(f" {_letter(role)} ", style=f"bold white on {colour}")
        text.append(f" {role}   ")
    if any(block.commit is not None for block in blocks):
        text.append("keep: the commit pass, where it reads something else   ")
    if any(block.jobs for block in blocks):
        text.append("job: a forward that only fills the cache")
    return text


def _letter(role: str) -> str:
    return "#" if role == BLOCK else role[0].upper()


def _num_frames(blocks: Sequence[SimulatedBlock]) -> int:
    """Frames up to the end of the last pass, which may be a window of several blocks."""
    last = blocks[-1].denoise.pass_
    return last.start_frame + last.num_frames


def _own_span(record: PassRecord) -> Span:
    first = record.pass_.start_frame
    frames = tuple(range(first, first + record.pass_.num_frames))
    return Span(BLOCK, frames, record.query_positions, (1.0,) * len(frames))


def _line(
    label: str,
    record: PassRecord,
    colours: Mapping[str, str],
    width: int,
    per_column: int,
    *,
    is_faint: bool = False,
) -> Text:
    cells: list[tuple[str, str, float] | None] = [None] * width
    spans = [*record.spans, _own_span(record)]
    for span in spans:
        for frame, share in zip(span.frames, span.shares, strict=True):
            column = frame // per_column
            known = cells[column]
            if share and (known is None or known[2] < share or span.role == BLOCK):
                letter = _letter(span.role)
                cells[column] = (letter if share > WHOLE else letter.lower(), colours[span.role], share)
    line = Text(f"{label}  ")
    for cell in cells:
        if cell is None:
            line.append("·", style="dim")
        else:
            line.append(cell[0], style=f"{'dim' if is_faint else 'bold'} white on {cell[1]}")
    line.append("  ")
    for index, span in enumerate(_merged(spans)):
        line.append("; " if index else "")
        line.append(span.role, style=f"bold {colours[span.role]}")
        heads = "" if span.heads is None else f" (heads {numbers(span.heads)})"
        share = "" if span.share > WHOLE or not span.frames else f" ({span.share:.0%})"
        positions = f" @ {numbers(span.positions)}" if span.positions else ""
        line.append(f"{heads} {numbers(span.frames)}{share}{positions}")
    return line


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Neighbouring spans of one role as one."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and (last.role, last.heads) == (span.role, span.heads):
            merged[-1] = Span(
                span.role,
                last.frames + span.frames,
                last.positions + span.positions,
                last.shares + span.shares,
                last.num_tokens + span.num_tokens,
                span.heads,
            )
        else:
            merged.append(span)
    return merged


def draw(blocks: Sequence[SimulatedBlock], path: Path, *, title: str, num_trained_frames: int = 21) -> None:
    """Draw which frames each block reads, and at which positions, side by side.

    Args:
        blocks: Of ``play``.
        path: PNG to write, in a palette of 128 colours to keep it small.
        title: Above the picture.
        num_trained_frames: Positions from 0 to here are shaded: what a model has been trained at.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("the picture needs the package matplotlib (not installed): pip install matplotlib.") from None
    from PIL import Image

    figure = Figure(figsize=(13.0, 1.7 + 0.26 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = roles(blocks)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_frames(left, blocks, colours)
    _draw_positions(right, blocks, colours, num_trained_frames)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    handles = [Patch(color=colour, label=role) for role, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) + 1, frameon=False, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=90)
    buffer.seek(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


def _draw_frames(axis: "Axes", blocks: Sequence[SimulatedBlock], colours: Mapping[str, str]) -> None:
    total = _num_frames(blocks)
    boxes: list[_Box] = []
    for row, block in enumerate(blocks):
        cells: dict[float, list[tuple[str, float, float | None]]] = {}
        for span in [*block.denoise.spans, _own_span(block.denoise)]:
            for frame, share, position in zip(span.frames, span.shares, _places(span), strict=True):
                if share:
                    cells.setdefault(float(frame), []).append((span.role, share, position))
        boxes += _stacked(row, cells, 1.0)
    _fill(axis, boxes, colours, is_labelled=total <= LABELLED_FRAMES)
    _mark_events(axis, blocks)
    for row, block in enumerate(blocks):
        if block.event != "keep":
            axis.text(
                total - 0.5, row - 0.54, f"new prompt: {block.event}", fontsize=7, color=EVENT_COLOUR, ha="right"
            )
    axis.set_xlim(-0.6, total - 0.4)
    axis.set_ylim(len(blocks) - 0.5, -0.5)
    axis.set_yticks(range(len(blocks)))
    axis.set_ylabel("block")
    axis.set_xlabel("frame of the video" + (" (numbers: its temporal position)" if total <= LABELLED_FRAMES else ""))
    _strip(axis)


def _places(span: Span) -> Sequence[float | None]:
    """Position of each frame; None where its tokens stand neither together nor at home."""
    if len(span.positions) == len(span.frames):
        return span.positions
    is_home = set(span.positions) <= set(map(float, span.frames)) and len(set(span.shares)) > 1
    return [float(frame) if is_home else None for frame in span.frames]


def _draw_positions(
    axis: "Axes", blocks: Sequence[SimulatedBlock], colours: Mapping[str, str], num_trained_frames: int
) -> None:
    axis.axvspan(-0.5, num_trained_frames - 0.5, color="#eceff4", zorder=0)
    boxes: list[_Box] = []
    for row, block in enumerate(blocks):
        cells: dict[float, list[tuple[str, float, float | None]]] = {}
        for span in [*block.denoise.spans, _own_span(block.denoise)]:
            shares = [share for share in span.shares if share]
            if len(shares) != len(span.positions):
                shares = [span.share] * len(span.positions)
            for position, share in zip(span.positions, shares, strict=True):
                cells.setdefault(position, []).append((span.role, share, None))
        places = sorted(cells)
        step = min((b - a for a, b in zip(places, places[1:], strict=False)), default=1.0)
        boxes += _stacked(row, cells, min(1.0, max(step, 0.2)))
    _fill(axis, boxes, colours)
    _mark_events(axis, blocks)
    places = [box.x for box in boxes]
    axis.set_xlim(min(-1.0, *places) - 0.1, max(num_trained_frames, *places) + 1.0)
    axis.set_xlabel(f"temporal position (shaded: {num_trained_frames} frames of training)")
    _strip(axis)


@dataclass(frozen=True)
class _Box:
    """A coloured cell; ``x`` is its middle, ``y`` its upper edge."""

    x: float
    y: float
    width: float
    height: float
    role: str
    share: float
    label: float | None


def _stacked(
    row: int, cells: Mapping[float, Sequence[tuple[str, float, float | None]]], width: float
) -> Iterator[_Box]:
    """Boxes of a row; what shares a place shares its height, but groups of heads that read the same are one."""
    for x, entries in cells.items():
        shares: dict[tuple[str, float | None], float] = {}
        for role, share, label in entries:
            shares[role, label] = max(share, shares.get((role, label), 0.0))
        height = ROW_HEIGHT / len(shares)
        for part, ((role, label), share) in enumerate(shares.items()):
            yield _Box(x, row - ROW_HEIGHT / 2 + part * height, width, height, role, share, label)


def _fill(axis: "Axes", boxes: Sequence[_Box], colours: Mapping[str, str], *, is_labelled: bool = False) -> None:
    """Draw boxes, those of few tokens paler."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    corners = []
    for box in boxes:
        left, right, bottom = box.x - box.width / 2, box.x + box.width / 2, box.y + box.height
        corners.append([(left, box.y), (right, box.y), (right, bottom), (left, bottom)])
    faces = [to_rgba(colours[box.role], max(0.3, min(1.0, box.share))) for box in boxes]
    axis.add_collection(PolyCollection(corners, facecolors=faces, edgecolors="white", linewidths=0.7))
    for box in boxes:
        if is_labelled and box.label is not None:
            axis.text(
                box.x,
                box.y + box.height / 2 + 0.03,
                f"{box.label:.3g}",
                color="white" if box.share > 0.5 else "#202020",
                fontsize=6.5 if box.height == ROW_HEIGHT else 4.5,
                ha="center",
                va="center",
            )


def _mark_events(axis: "Axes", blocks: Sequence[SimulatedBlock]) -> None:
    for row, block in enumerate(blocks):
        if block.event != "keep":
            axis.axhline(row - 0.5, color=EVENT_COLOUR, linewidth=1.2)


def _strip(axis: "Axes") -> None:
    axis.tick_params(length=0, labelsize=8)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
