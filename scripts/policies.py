"""List the cache policies, show one as YAML, or explain in text and pictures what its blocks read."""

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import yaml
from rich.text import Text
from typer import Argument, Option

from longtake.cache import POLICIES, CachePolicy, Event, Geometry, make_policy
from longtake.cache.simulation import PassRecord, SimulatedBlock, Span, simulate
from longtake.configs.fields import choose, preset_names
from longtake.configs.loader import load_preset
from longtake.scripts.console import out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GB = 1e9
_FRAMES_PER_SECOND = 4  # latent ones, at 16 pixel frames a second
_SETTLED_BLOCKS = 12  # as many as change nothing, and a policy is taken to be in its steady state
_MOST_BLOCKS = 720  # then it is taken to grow for ever: 9 minutes in blocks of 3
_MINUTE = 60
_REFERENCE = re.compile(r"arXiv:[0-9.]+[0-9]")
_TABLE_NOTE = (
    "Presets on Wan2.1 1.3B at 832x480 in bfloat16. block: latent frames denoised together. attends: frames' worth of "
    "tokens that a block attends to, itself included. reads, stores: GB of keys and values that a block reads beside "
    "its own, and that are kept. Figures of an unbounded policy are those of one minute."
)


def policies(
    name: Annotated[str | None, Argument(help="Show this one's preset as YAML.", show_default=False)] = None,
    *,
    explain: Annotated[bool, Option("--explain", help="Show what each block reads.")] = False,
    blocks: Annotated[int, Option(help="Blocks to explain.", min=1)] = 12,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Change a field of the preset; may be repeated.")
    ] = None,
    event: Annotated[
        list[str] | None, Option(metavar="BLOCK:EVENT", help="A new prompt at a block: 6:recache; may be repeated.")
    ] = None,
    frames_per_block: Annotated[
        int | None, Option(help="Latent frames denoised together.", show_default="the source's", min=1)
    ] = None,
    layer: Annotated[int, Option(help="Layer to explain, of six; from the last backwards if negative.")] = -1,
    png: Annotated[
        Path | None, Option("--out", "--png", help="Draw it, too, into this PNG file.", show_default=False)
    ] = None,
) -> None:
    """List the cache policies with what they attend to and cost, or explain one.

    **Examples**

    `longtake policies`

    `longtake policies attention_sink > my_cache.yaml`

    `longtake policies attention_sink --explain --set num_sink_frames=6 --out sinks.png`
    """
    if name is None:
        if explain or set_ or event or png:
            raise ValueError("--explain, --set, --event and --out are about one policy: give its name.")
        for line in _table(frames_per_block):
            out.print(line)
        return
    choose(POLICIES, name, what="cache policy")
    settings = _changed(name, set_ or ())
    if not explain:
        if set_:
            make_policy(settings)
        out.print(yaml.safe_dump(settings, sort_keys=False).rstrip(), markup=False)
        return
    policy = make_policy(settings)
    events = _parse_events(event or ())
    size = frames_per_block or policy.published_block
    policy.check(size)
    played = play(policy, num_blocks=blocks, frames_per_block=size, events=events, layer=layer)
    _print_explained(policy, played, frames_per_block=size)
    if png is not None:
        draw(policy, played, png)
        out.print(str(png), markup=False, style="bold")


def _changed(name: str, changes: Iterable[str]) -> dict[str, Any]:
    """A policy's preset with some fields changed: ``key=value``, dots reach into mappings."""
    settings: dict[str, Any] = load_preset("cache", name) if name in preset_names("cache") else {"policy": name}
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals or not path:
            raise ValueError(f"--set {change!r}: write key=value, for example num_sink_frames=4.")
        *outer, key = path.split(".")
        place = settings
        for part in outer:
            place[part] = {"policy": place[part]} if isinstance(place.get(part), str) else place.get(part, {})
            place = place[part]
        place[key] = yaml.safe_load(value)
    return settings


def _parse_events(texts: Iterable[str]) -> dict[int, Event]:
    events: dict[int, Event] = {}
    for text in texts:
        block, _, event = text.partition(":")
        if not block.isdigit() or not event:
            raise ValueError(f"--event {text!r}: write BLOCK:EVENT, for example 6:recache.")
        events[int(block)] = cast(Event, event)
    return events


def _table(frames_per_block: int | None) -> Iterator[Text]:
    width = min(out.width, 110)
    yield Text(_filled(_TABLE_NOTE, width), style="dim")
    yield Text()
    yield _row("policy", "block", "attends", "reads", "stores", "bounded", "needs", "events", style="bold")
    for name, cls in POLICIES.items():
        what = _summary(cls)
        try:
            policy = preset_policy(name)
            size = frames_per_block or policy.published_block
            row = facts(policy, _wan_1_3b(size))
        except ValueError as error:
            cells = ["-"] * 7
            what += f" The preset alone does not run here: {error}"
        else:
            bounded = "yes" if not row.grows else f"+{row.grows / GB:.3g}/min"
            sizes = f"{row.context_frames:.3g}", f"{row.attended_bytes / GB:.2f}", f"{row.stored_bytes / GB:.2f}"
            cells = [str(size), *sizes, bounded, needs(policy), ", ".join(sorted(policy.events - {"keep"})) or "-"]
        yield _row(name, *cells, style="bold cyan")
        yield Text(_filled(what, width, indent="  "), style="dim")


def _filled(text: str, width: int, *, indent: str = "") -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, initial_indent=indent, subsequent_indent=indent)


def _row(name: str, *cells: str, style: str) -> Text:
    figures = "{:>5} {:>7} {:>6} {:>6}  {:<9} {:<12} {}".format(*cells)
    return Text(f"{name:<16}", style=style).append(figures, style="not bold default")


def _print_explained(policy: CachePolicy, blocks: Sequence[SimulatedBlock], *, frames_per_block: int) -> None:
    out.print(f"[bold]{policy.name}[/bold]  {_summary(type(policy))}")
    fields = {key: value for key, value in policy.settings().items() if key != "policy"}
    out.print(", ".join(f"{key}={value}" for key, value in fields.items()) or "no settings", markup=False, style="dim")
    out.print()
    for line in _lines(blocks):
        out.print(line)
    out.print()
    out.print(_legend(blocks))
    needed = f"needs: {needs(policy).replace('-', 'nothing')}"
    try:
        row = facts(policy, _wan_1_3b(frames_per_block))
    except ValueError as error:
        cost = f"{error} {needed}"
    else:
        growth = "" if not row.grows else f" after {row.after_seconds:.0f} s, growing"
        cost = (
            f"attends to {row.context_frames:.3g} frames ({row.context_tokens:,} tokens) with the block, reads "
            f"{row.attended_bytes / GB:.2f} GB, stores {row.stored_bytes / GB:.2f} GB{growth}; {needed}"
        )
    out.print(f"Wan2.1 1.3B at 832x480: {cost}")


def _title(policy: CachePolicy, blocks: Sequence[SimulatedBlock]) -> str:
    shown = {key: value for key, value in policy.settings().items() if "frames" in key or key == "positions"}
    parts = [f"{key.removeprefix('num_').removesuffix('_frames')} {value}" for key, value in shown.items()]
    parts += [f"{block.event} at block {block.index}" for block in blocks if block.event != "keep"]
    return f"{policy.name}: {', '.join(parts)}" if parts else policy.name


@dataclass(frozen=True)
class _PolicyFacts:
    context_frames: float  # most that a block or window attends to, itself included, in frames' worth of tokens
    context_tokens: int  # the same in tokens
    attended_bytes: int  # keys and values that it attends to beside itself
    stored_bytes: int  # keys and values that are kept between blocks
    grows: float  # bytes per minute of video that are still added to what is stored; 0: bounded
    after_seconds: float  # length of video at which these are the figures, or from which on they hold


def _wan_1_3b(frames_per_block: int = 3) -> Geometry:
    """Wan2.1-T2V-1.3B at 832x480 in bfloat16: 30 layers, 12 heads of 128, 1,560 tokens a frame; sizes alone."""
    shapes: dict[str, Any] = {"num_layers": 30, "num_heads": 12, "head_dim": 128, "num_rows": 30, "num_columns": 52}
    return Geometry(**shapes, frames_per_block=frames_per_block, dtype=torch.bfloat16, device=torch.device("meta"))


def preset_policy(name: str) -> CachePolicy:
    """Make a policy as its preset has it; a ValueError if that cannot stand alone, for want of a user's file, say."""
    return make_policy(_changed(name, ()))


def _summary(cls: type[CachePolicy]) -> str:
    """First paragraph of a policy's docstring, and its source unless the paragraph names it already."""
    first = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
    references = _REFERENCE.findall(cls.source) or [cls.source]
    return first if all(reference in first for reference in references) else f"{first} Source: {cls.source}."


def needs(policy: CachePolicy) -> str:
    """Needs beside the model: weights or a VAE."""
    wanted = {"VAE": policy.traits.needs_vae, "weights": policy.traits.needs_weights}
    return ", ".join(name for name, is_needed in wanted.items() if is_needed) or "-"


@cache
def facts(policy: CachePolicy, geometry: Geometry | None = None) -> _PolicyFacts:
    """Play a policy until nothing changes any more, or for a minute if that never comes.

    One layer is played for all: policies that treat layers differently keep as much in each of them, or refuse a
    model of one layer, and then all are played. The shapes are Wan2.1 1.3B's with the source's blocks unless given.
    """
    try:
        return _measured(policy, geometry or _wan_1_3b(policy.published_block))
    except RuntimeError as error:
        raise ValueError(f"what {policy.name} needs is made for a model of other shapes ({error}).") from error


def _measured(policy: CachePolicy, g: Geometry) -> _PolicyFacts:
    played = replace(g, num_layers=1)
    try:
        policy.start(played)
    except ValueError:
        played = g
    attended, stored, steady, seconds, is_settled = 0.0, 0, 0, 0.0, False
    for block in simulate(policy, played, _MOST_BLOCKS, window_blocks=policy.published_window):
        now_attended, now_stored = block.denoise.num_tokens, block.stats.num_bytes
        if now_attended > attended or now_stored > stored:
            attended, stored, steady = max(attended, now_attended), max(stored, now_stored), block.index
        is_bounded = block.denoise.is_bounded or not block.denoise.spans
        seconds = (block.start_frame + block.num_frames) / _FRAMES_PER_SECOND
        is_settled = block.index >= steady + _SETTLED_BLOCKS
        if is_settled or (not is_bounded and seconds >= _MINUTE):
            break
    stored = stored * g.num_layers // played.num_layers
    token_bytes = 2 * g.num_layers * g.num_heads * g.head_dim * g.dtype.itemsize * g.batch_size
    context = round(attended) + policy.published_window * g.frames_per_block * g.tokens_per_frame
    return _PolicyFacts(
        context_frames=context / g.tokens_per_frame,
        context_tokens=context,
        attended_bytes=round(attended * token_bytes),
        stored_bytes=stored,
        grows=0.0 if is_settled else stored / seconds * _MINUTE,
        after_seconds=(steady + 1) * g.frames_per_block / _FRAMES_PER_SECOND if is_settled else seconds,
    )


_BLOCK = "block"
_TOY_CHANNELS = 12  # of the bundled model's latents
_COLOURS = {"sink": "#3f78c4", "recent": "#5aa872", "mid": "#e5994b", "memory": "#9a6fc0", _BLOCK: "#3a3f4b"}
_EVENT_COLOUR = "#c0392b"
_ROW_HEIGHT = 0.84
_OTHER_COLOURS = ("#d1605e", "#4bb3b8", "#c9b23c", "#b0728f", "#7d8f4e", "#8c8c8c")
_TEXT_FRAMES = 60  # most columns of the text picture; more frames share a column
_LABELLED_FRAMES = 45  # more, and numbers would not be readable
_WHOLE = 0.99  # a frame of which so much is read is read
_TRAINED_FRAMES = 21  # of a five-second model
_MAX_LISTED = 3  # runs of numbers before a list is shortened


def _toy_geometry(frames_per_block: int = 3) -> Geometry:
    """Shapes of the bundled model."""
    shapes: dict[str, Any] = {"num_layers": 6, "num_heads": 6, "head_dim": 32, "num_rows": 4, "num_columns": 4}
    return Geometry(**shapes, frames_per_block=frames_per_block, dtype=torch.float32)


def play(
    policy: CachePolicy,
    *,
    num_blocks: int = 12,
    frames_per_block: int = 3,
    events: Mapping[int, Event] | None = None,
    layer: int = -1,
) -> list[SimulatedBlock]:
    """Play a rollout of the bundled model's shapes, and note what one layer reads."""
    geometry = _toy_geometry(frames_per_block)
    if not -geometry.num_layers <= layer < geometry.num_layers:
        raise ValueError(f"layer={layer} does not exist: the model played has layers 0 to {geometry.num_layers - 1}.")
    shown: dict[str, Any] = {"latent_channels": _TOY_CHANNELS, "layer": layer}
    return list(simulate(policy, geometry, num_blocks, events=events, window_blocks=policy.published_window, **shown))


def _roles(blocks: Sequence[SimulatedBlock]) -> dict[str, str]:
    """Colours by role, in order of appearance; the block itself is last."""
    found: dict[str, str] = {}
    others = iter(_OTHER_COLOURS * 3)
    for record in (record for block in blocks for record in (block.denoise, *block.jobs)):
        for span in record.spans:
            if span.role not in found:
                found[span.role] = _COLOURS.get(span.role) or next(others)
    return found | {_BLOCK: _COLOURS[_BLOCK]}


def _numbers(values: Iterable[float]) -> str:
    """Write numbers as ranges: 0-2, 6, 8-11; more than three ranges as first to last."""
    runs: list[list[float]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    if len(runs) > _MAX_LISTED:
        return f"{runs[0][0]:g}..{runs[-1][1]:g}"
    return ", ".join(f"{first:g}" if first == last else f"{first:g}-{last:g}" for first, last in runs)


def _lines(blocks: Sequence[SimulatedBlock]) -> Iterator[Text]:
    """A line per block: a strip of its frames, one letter each, and what is read at which positions.

    Capital letters are whole frames, small ones part of a frame's tokens, ``#`` the block itself.
    """
    colours, total = _roles(blocks), _num_frames(blocks)
    per_column = -(-total // _TEXT_FRAMES)
    width = -(-total // per_column)
    heading = "frames" if per_column == 1 else f"frames, {per_column} to a letter"
    yield Text(f"block  {heading:<{width}}  reads @ positions", style="bold")
    for block in blocks:
        if block.event != "keep":
            yield Text(f"       new prompt: {block.event}", style="bold red")
        commit = [] if block.commit is None else [(" keep", block.commit)]
        jobs = [(" job ", job) for job in block.jobs]
        for label, record in [(f"{block.index:5d}", block.denoise), *commit, *jobs]:
            strength = "bold" if record is block.denoise else "dim"
            yield Text(f"{label}  ") + _strip(record, colours, width, per_column, strength) + _read(record, colours)


def _legend(blocks: Sequence[SimulatedBlock]) -> Text:
    text = Text("")
    for role, colour in _roles(blocks).items():
        text.append(f" {_letter(role)} ", style=f"bold white on {colour}")
        text.append(f" {role}   ")
    if any(block.commit is not None for block in blocks):
        text.append("keep: the commit pass, where it reads something else   ")
    if any(block.jobs for block in blocks):
        text.append("job: a forward that only fills the cache")
    return text


def _letter(role: str) -> str:
    return "#" if role == _BLOCK else role[0].upper()


def _num_frames(blocks: Sequence[SimulatedBlock]) -> int:
    """Frames up to the end of the last pass, which may be a window of several blocks."""
    last = blocks[-1].denoise.pass_
    return last.start_frame + last.num_frames


def _spans(record: PassRecord) -> list[Span]:
    first = record.pass_.start_frame
    frames = tuple(range(first, first + record.pass_.num_frames))
    return [*record.spans, Span(_BLOCK, frames, record.query_positions, (1.0,) * len(frames))]


def _strip(record: PassRecord, colours: Mapping[str, str], width: int, per_column: int, strength: str) -> Text:
    # The letter of a column is that of the role that has most of its frames' tokens.
    cells: dict[int, tuple[str, float]] = {}
    for span in _spans(record):
        for frame, share in zip(span.frames, span.shares, strict=True):
            column = frame // per_column
            if share and (column not in cells or cells[column][1] < share or span.role == _BLOCK):
                cells[column] = span.role, share
    line = Text()
    for column in range(width):
        if column not in cells:
            line.append("·", style="dim")
            continue
        role, share = cells[column]
        letter = _letter(role) if share > _WHOLE else _letter(role).lower()
        line.append(letter, style=f"{strength} white on {colours[role]}")
    return line.append("  ")


def _read(record: PassRecord, colours: Mapping[str, str]) -> Text:
    line = Text()
    for index, span in enumerate(_merged(_spans(record))):
        line.append("; " if index else "")
        line.append(span.role, style=f"bold {colours[span.role]}")
        heads = "" if span.heads is None else f" (heads {_numbers(span.heads)})"
        share = "" if span.share > _WHOLE or not span.frames else f" ({span.share:.0%})"
        positions = f" @ {_numbers(span.positions)}" if span.positions else ""
        line.append(f"{heads} {_numbers(span.frames)}{share}{positions}")
    return line


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Neighbouring spans of one role and of the same heads as one."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and (last.role, last.heads) == (span.role, span.heads):
            joined = {key: getattr(last, key) + getattr(span, key) for key in ("frames", "positions", "shares")}
            merged[-1] = replace(last, **joined, num_tokens=last.num_tokens + span.num_tokens)
        else:
            merged.append(span)
    return merged


def draw(policy: CachePolicy, blocks: Sequence[SimulatedBlock], path: Path) -> None:
    """Draw into a PNG which frames each block reads, and at which positions, side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("the picture needs the package matplotlib (not installed): pip install matplotlib.") from None
    from PIL import Image

    figure = Figure(figsize=(13.0, 1.7 + 0.26 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = _roles(blocks)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_frames(left, blocks, colours)
    _draw_positions(right, blocks, colours)
    for axis in (left, right):
        for row, block in enumerate(blocks):
            if block.event != "keep":
                axis.axhline(row - 0.5, color=_EVENT_COLOUR, linewidth=1.2)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
    figure.suptitle(_title(policy, blocks), fontsize=12, fontweight="bold")
    handles = [Patch(color=colour, label=role) for role, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) + 1, frameon=False, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=90)
    buffer.seek(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


def _draw_frames(axis: "Axes", blocks: Sequence[SimulatedBlock], colours: Mapping[str, str]) -> None:
    total = _num_frames(blocks)
    is_labelled = total <= _LABELLED_FRAMES

    def entries(span: Span) -> Iterable[tuple[float, float, float | None]]:
        return zip(span.frames, span.shares, _places(span), strict=True)

    _fill(axis, blocks, entries, colours, is_labelled=is_labelled)
    for row, block in enumerate(blocks):
        if block.event != "keep":
            note = {"fontsize": 7, "color": _EVENT_COLOUR, "ha": "right"}
            axis.text(total - 0.5, row - 0.54, f"new prompt: {block.event}", **note)
    axis.set_xlim(-0.6, total - 0.4)
    axis.set_ylim(len(blocks) - 0.5, -0.5)
    axis.set_yticks(range(len(blocks)))
    axis.set_ylabel("block")
    axis.set_xlabel("frame of the video" + (" (numbers: its temporal position)" if is_labelled else ""))


def _places(span: Span) -> Sequence[float | None]:
    """Position of each frame; None where its tokens stand neither together nor at home."""
    if len(span.positions) == len(span.frames):
        return span.positions
    is_home = set(span.positions) <= set(map(float, span.frames)) and len(set(span.shares)) > 1
    return [float(frame) if is_home else None for frame in span.frames]


def _draw_positions(axis: "Axes", blocks: Sequence[SimulatedBlock], colours: Mapping[str, str]) -> None:
    def entries(span: Span) -> Iterable[tuple[float, float, float | None]]:
        shares = [share for share in span.shares if share]
        if len(shares) != len(span.positions):
            shares = [span.share] * len(span.positions)
        return ((position, share, None) for position, share in zip(span.positions, shares, strict=True))

    axis.axvspan(-0.5, _TRAINED_FRAMES - 0.5, color="#eceff4", zorder=0)
    places = _fill(axis, blocks, entries, colours)
    axis.set_xlim(min(-1.0, *places) - 0.1, max(_TRAINED_FRAMES, *places) + 1.0)
    axis.set_xlabel(f"temporal position (shaded: {_TRAINED_FRAMES} frames of training)")


def _fill(
    axis: "Axes",
    blocks: Sequence[SimulatedBlock],
    entries: Callable[[Span], Iterable[tuple[float, float, float | None]]],
    colours: Mapping[str, str],
    *,
    is_labelled: bool = False,
) -> list[float]:
    """Draw cells of all rows, paler where few tokens are read, from ``entries``; return their places.

    ``entries`` gives the (place, share of tokens, label) of a span. Roles that share a place share its height, but
    groups of heads that read the same are one.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    boxes, faces, all_places = [], [], []
    for row, block in enumerate(blocks):
        cells: dict[float, dict[tuple[str, float | None], float]] = {}
        for span in _spans(block.denoise):
            for x, share, label in entries(span):
                if share:
                    cell = cells.setdefault(float(x), {})
                    cell[span.role, label] = max(share, cell.get((span.role, label), 0.0))
        places = sorted(cells)
        all_places += places
        width = min(1.0, max(0.2, min((b - a for a, b in pairwise(places)), default=1.0)))
        for x, shares in cells.items():
            height = _ROW_HEIGHT / len(shares)
            for part, ((role, label), share) in enumerate(shares.items()):
                top = row - _ROW_HEIGHT / 2 + part * height
                boxes.append(Rectangle((x - width / 2, top), width, height))
                faces.append(to_rgba(colours[role], max(0.3, min(1.0, share))))
                if is_labelled and label is not None:
                    style = {
                        "color": "white" if share > 0.5 else "#202020",
                        "fontsize": 6.5 if len(shares) == 1 else 4.5,
                    }
                    axis.text(x, top + height / 2 + 0.03, f"{label:.3g}", ha="center", va="center", **style)
    axis.add_collection(PatchCollection(boxes, facecolors=faces, edgecolors="white", linewidths=0.7))
    return all_places
