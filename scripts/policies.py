"""List the cache policies, show one as YAML, or explain what it reads block by block."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.text import Text

from longtake.scripts.console import out

if TYPE_CHECKING:
    from longtake.cache import CachePolicy, Event

GB = 1e9


def policies(
    name: Annotated[str | None, typer.Argument(help="Show this one's preset as YAML.", show_default=False)] = None,
    *,
    explain: Annotated[bool, typer.Option("--explain", help="Show what each block reads.")] = False,
    blocks: Annotated[int, typer.Option(help="Blocks to explain.", min=1)] = 12,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the preset; may be repeated.")
    ] = (),
    event: Annotated[
        list[str],
        typer.Option(metavar="BLOCK:EVENT", help="A new prompt at a block: 6:recache; may be repeated."),
    ] = (),
    frames_per_block: Annotated[
        int | None, typer.Option(help="Latent frames denoised together.", show_default="the source's", min=1)
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer to explain, of six; from the last backwards if negative.")] = -1,
    png: Annotated[
        Path | None, typer.Option("--out", "--png", help="Draw it, too, into this PNG file.", show_default=False)
    ] = None,
) -> None:
    """List the cache policies with what they attend to and cost, or explain one.

    **Examples**

    `longtake policies`

    `longtake policies attention_sink > my_cache.yaml`

    `longtake policies attention_sink --explain --set num_sink_frames=6 --out sinks.png`
    """
    from longtake.cache import POLICIES, make_policy
    from longtake.configs.fields import choose

    if name is None:
        if explain or set_ or event or png:
            raise ValueError("--explain, --set, --event and --out are about one policy: give its name.")
        for line in _table(frames_per_block):
            out.print(line)
        return
    choose(POLICIES, name, what="cache policy")
    settings = changed(name, set_)
    if explain:
        _explain(
            make_policy(settings),
            num_blocks=blocks,
            frames_per_block=frames_per_block,
            events=_parse_events(event),
            layer=layer,
            png=png,
        )
        return
    if set_:
        make_policy(settings)
    out.print(yaml.safe_dump(settings, sort_keys=False).rstrip(), markup=False)


def changed(name: str, changes: Sequence[str]) -> dict[str, Any]:
    """A policy's preset with some fields changed.

    Args:
        name: Of the policy.
        changes: ``key=value``; values as in YAML, dots reach into mappings.

    Raises:
        ValueError: If a change is not written so.
    """
    from longtake.configs.loader import load_preset, preset_names

    settings = load_preset("cache", name) if name in preset_names("cache") else {"policy": name}
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


def _parse_events(texts: Sequence[str]) -> "dict[int, Event]":
    """Read ``BLOCK:EVENT`` texts into events by block index.

    Raises:
        ValueError: If a text is anything else.
    """
    events: dict[int, Event] = {}
    for text in texts:
        block, _, event = text.partition(":")
        if not block.isdigit() or not event:
            raise ValueError(f"--event {text!r}: write BLOCK:EVENT, for example 6:recache.")
        events[int(block)] = event
    return events


def _table(frames_per_block: int | None) -> Iterator[Text]:
    """A line of figures per policy, and what it is below."""
    from longtake.cache import POLICIES
    from longtake.scripts.policy_explained import events, facts, needs, preset_policy, summary, wan_1_3b

    width = min(out.width, 110)
    note = (
        "Presets on Wan2.1 1.3B at 832x480 in bfloat16. block: latent frames denoised together. attends: frames' "
        "worth of tokens that a block attends to, itself included. reads, stores: GB of keys and values that a block "
        "reads beside its own, and that are kept. Figures of an unbounded policy are those of one minute."
    )
    yield Text(_filled(note, width), style="dim")
    yield Text()
    yield _row(("policy", "block", "attends", "reads", "stores", "bounded", "needs", "events"), style="bold")
    for name, cls in POLICIES.items():
        what = summary(cls)
        try:
            policy = preset_policy(name)
            size = frames_per_block or policy.published_block
            row = facts(policy, wan_1_3b(size))
        except ValueError as error:
            cells = (name, "-", "-", "-", "-", "-", "-", "-")
            what += f" The preset alone does not run here: {error}"
        else:
            bounded = "yes" if row.is_bounded else f"+{row.grows / GB:.3g}/min"
            sizes = f"{row.context_frames:.3g}", f"{row.attended_bytes / GB:.2f}", f"{row.stored_bytes / GB:.2f}"
            cells = (name, str(size), *sizes, bounded, needs(policy), ", ".join(events(policy)) or "-")
        yield _row(cells, style="bold cyan")
        yield Text(_filled(what, width, indent="  "), style="dim")


def _filled(text: str, width: int, *, indent: str = "") -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, initial_indent=indent, subsequent_indent=indent)


def _row(cells: tuple[str, ...], *, style: str) -> Text:
    name, block, attends, reads, stores, bounded, needed, events = cells
    text = Text(f"{name:<16}", style=style)
    text.append(
        f"{block:>5} {attends:>7} {reads:>6} {stores:>6}  {bounded:<9} {needed:<12} {events}", style="not bold default"
    )
    return text


def _explain(
    policy: "CachePolicy",
    *,
    num_blocks: int,
    frames_per_block: int | None,
    events: "Mapping[int, Event]",
    layer: int,
    png: Path | None,
) -> None:
    from longtake.scripts.policy_explained import draw, legend, lines, play, summary

    size = frames_per_block or policy.published_block
    policy.check(size)
    blocks = play(policy, num_blocks=num_blocks, frames_per_block=size, events=events, layer=layer)
    out.print(f"[bold]{policy.name}[/bold]  {summary(type(policy))}")
    fields = {key: value for key, value in policy.settings().items() if key != "policy"}
    out.print(", ".join(f"{key}={value}" for key, value in fields.items()) or "no settings", markup=False, style="dim")
    out.print()
    for line in lines(blocks):
        out.print(line)
    out.print()
    out.print(legend(blocks))
    out.print(_cost(policy, size))
    if png is not None:
        draw(blocks, png, title=title(policy, events))
        out.print(str(png), markup=False, style="bold")


def _cost(policy: "CachePolicy", frames_per_block: int) -> str:
    from longtake.scripts.policy_explained import facts, needs, wan_1_3b

    needed = f"needs: {needs(policy).replace('-', 'nothing')}"
    try:
        row = facts(policy, wan_1_3b(frames_per_block))
    except ValueError as error:
        return f"Wan2.1 1.3B at 832x480: {error} {needed}"
    growth = "" if row.is_bounded else f" after {row.after_seconds:.0f} s, growing"
    return (
        f"Wan2.1 1.3B at 832x480: attends to {row.context_frames:.3g} frames ({row.context_tokens:,} tokens) with the "
        f"block, reads {row.attended_bytes / GB:.2f} GB, stores {row.stored_bytes / GB:.2f} GB{growth}; {needed}"
    )


def title(policy: "CachePolicy", events: "Mapping[int, Event] | None" = None) -> str:
    """Name and main settings, for the top of a picture."""
    shown = {key: value for key, value in policy.settings().items() if "frames" in key or key == "positions"}
    parts = [f"{key.removeprefix('num_').removesuffix('_frames')} {value}" for key, value in shown.items()]
    parts += [f"{event} at block {block}" for block, event in (events or {}).items()]
    return f"{policy.name}: {', '.join(parts)}" if parts else policy.name
