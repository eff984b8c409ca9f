"""Write docs/policies.md from the policies' docstrings, presets and sizes, and draw each policy's context."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from longtake.cache import POLICIES, CachePolicy, Event
from longtake.cache.simulation import SimulatedBlock
from longtake.scripts.console import out
from longtake.scripts.policies import draw, facts, needs, play, preset_policy

PAGE = Path("docs/policies.md")
FRAMES = 42
EVENT_BLOCK = 9  # every preset's context is full by then
GB = 1e9
COMMON = ("num_context_frames", "num_sink_frames", "positions")  # explained once, in the page's head
INTRO = f"""# Cache policies

<!-- written by `make docs-policies` from docstrings, presets and sizes; change those instead -->

A policy chooses the context of a block: frames or tokens of the past, and their temporal positions. `cache: NAME`
in YAML or `--cache NAME` selects one; `longtake policies NAME --explain --out FILE.png` draws these pictures for any
settings. [Adding a policy](adding_a_policy.md).

**Table**: the presets on Wan2.1 1.3B at 832x480 (30 layers, 12 heads of 128, 1,560 tokens a frame) in bfloat16,
with the source's block size. *Attends*: frames' worth of tokens, the block included. *Reads*: keys and values beside
the block's own. *Stores*: of an unbounded policy after one minute.

**Pictures** of {FRAMES} frames. Left: frames that a block (row) reads, with temporal positions. Right: the same by
position; shaded is the trained range of a five-second model. Pale: part of a frame's tokens. Content is random where
a policy chooses by it.

**Common fields**: `num_context_frames` counts everything attended, the block included; `num_sink_frames` first frames
always kept; `positions` places frames at their own index (`absolute`) or side by side (`contiguous`).
"""


@dataclass(frozen=True)
class Pictures:
    """Which pictures of a policy there are.

    Attributes:
        events: None is the plain run; the others are prompt events that change what is read.
        twin: An earlier policy that reads the same.
    """

    events: tuple[Event | None, ...] = ()
    twin: str | None = None


def document_policies(
    page: Annotated[Path, typer.Option(help="Markdown page to write.")] = PAGE,
    *,
    pictures: Annotated[bool, typer.Option(help="Draw the pictures too.")] = True,
) -> None:
    """Write the page of all policies, and its pictures beside it in a folder of the page's name."""
    page.write_text(render(), encoding="utf-8")
    if not pictures:
        return
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    wanted = set()
    for name, shown in all_pictures().items():
        policy = preset_policy(name) if shown.events else None
        for event in shown.events:
            path = folder / picture_name(name, event)
            draw(policy, _played(policy, event), path)
            wanted.add(path)
            out.print(f"{path}  {path.stat().st_size / 1000:.0f} kB", markup=False)
    for path in set(folder.glob("*.png")) - wanted:
        path.unlink()


def render() -> str:
    """The page as Markdown; the same for the same registry, presets and docstrings."""
    table = [
        "| policy | block | attends, frames | reads, GB | stores, GB | bounded | needs | prompt events |",
        "|---|---|---|---|---|---|---|---|",
        *map(_row, POLICIES),
    ]
    pictures = all_pictures()
    sections = [section(name, pictures[name]) for name in POLICIES]
    return "\n".join([INTRO, *table, "", *sections]).rstrip() + "\n"


def section(name: str, shown: Pictures) -> str:
    """Section of one policy."""
    cls = POLICIES[name]
    parts = [f"## {name}", docstring(cls)]
    code = cls.__module__.removeprefix("longtake.").replace(".", "/") + ".py"
    papers = re.findall(r"arXiv:\d+\.\d+", cls.source)
    is_said = papers and all(paper in parts[1] for paper in papers)
    source = "" if is_said else f"Source: {cls.source}. "
    parts.append(f"{source}Code: [{code}](../{code}).")
    if shown.twin is not None:
        parts.append(f"Picture: as [{shown.twin}](#{shown.twin}).")
    for event in shown.events:
        what = f"{name}, {event} at block {EVENT_BLOCK}" if event else name
        parts.append(f"![{what}](policies/{picture_name(name, event)})")
    described = list(field_rows(cls))
    if described:
        parts.append("\n".join(["| field | default | meaning |", "|---|---|---|", *described]))
    return "\n\n".join(parts) + "\n"


def docstring(cls: type[CachePolicy]) -> str:
    """A policy's docstring as Markdown."""
    return inspect.cleandoc(cls.__doc__ or "").replace("``", "`")


def field_rows(cls: type[CachePolicy]) -> Iterator[str]:
    """Table rows of a policy's fields; the meaning is the comment beside or above them in the code."""
    comments: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        comments |= {name: text for name, text in field_comments(inspect.getsource(owner)).items() if text}
    for field in fields(cls):
        default = "" if repr(field.default).startswith("<dataclasses") else f"`{field.default}`"
        what = comments.get(field.name, "").replace("|", "\\|")
        yield f"| `{field.name}` | {default} | {what if field.name not in COMMON else ''} |"


def field_comments(source: str) -> dict[str, str]:
    """Comments of dataclass fields: at the end of their line, or on the lines right above."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in source.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            above.append(stripped.lstrip("# "))
            continue
        match = re.match(r"    ([a-z]\w*): [^#]*(?:#\s*(.*))?$", line)
        if match and "ClassVar" not in line:
            beside = [match[2]] if match[2] else []
            comments[match[1]] = " ".join(above + beside)
        above = []
    return comments


def all_pictures() -> dict[str, Pictures]:
    """The pictures of every policy of the registry."""
    pictures: dict[str, Pictures] = {}
    plain: dict[str, list[tuple]] = {}
    for name in POLICIES:
        try:
            policy = preset_policy(name)
            plain[name] = _reads(_played(policy, None))
        except ValueError:
            pictures[name] = Pictures()
            continue
        twin = next((other for other in plain if other != name and plain[other] == plain[name]), None)
        changing = [
            event for event in sorted(policy.events - {"keep"}) if _reads(_played(policy, event)) != plain[name]
        ]
        pictures[name] = Pictures((None, *changing)) if twin is None else Pictures(twin=twin)
    return pictures


def picture_name(name: str, event: Event | None) -> str:
    """File name of a picture."""
    return f"{name}.png" if event is None else f"{name}-{event}.png"


def _played(policy: CachePolicy, event: Event | None) -> list[SimulatedBlock]:
    happenings = {} if event is None else {EVENT_BLOCK: event}
    size = policy.published_block
    return play(policy, num_blocks=FRAMES // size, frames_per_block=size, events=happenings)


def _reads(blocks: list[SimulatedBlock]) -> list[tuple]:
    return [(block.denoise.spans, block.denoise.query_positions) for block in blocks]


def _row(name: str) -> str:
    known = f"[{name}](#{name})"
    try:
        policy = preset_policy(name)
        row = facts(policy)
    except ValueError:
        return f"| {known} | - | - | - | - | - | settings, see below | - |"
    bounded = "yes" if not row.grows else f"no: +{row.grows / GB:.3g} GB a minute"
    sizes = f"{row.context_frames:.3g} | {row.attended_bytes / GB:.2f} | {row.stored_bytes / GB:.2f}"
    cells = [
        known,
        str(policy.published_block),
        sizes,
        bounded,
        needs(policy),
        ", ".join(sorted(policy.events - {"keep"})) or "-",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(document_policies)
