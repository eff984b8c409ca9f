"""``longtake attention``: which backend a call gets on this machine, and what a policy leaves of it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table
from rich.text import Text

from longtake.configs.fields import did_you_mean
from longtake.scripts.console import out

if TYPE_CHECKING:
    from PIL.Image import Image

    from longtake.attention import AttentionGeometry, AttentionRequest, BlockPlan
    from longtake.attention.dispatch import Row

ASPECT = 832 / 480  # of a frame whose rows and columns are not said
WIDTH = 880  # pixels of all keys
MIN_HEIGHT = 120
MARGIN = 46  # pixels left of and above the mask
LINE_PIXELS = 6  # frames narrower than this are not told apart by lines
LABEL_PIXELS = 44  # between two numbers of frames
FONT_SIZE = 15
UNREAD = "#f1f3f7"
OTHER = "#9a6fc0"
COLOURS = {"sink": "#3f78c4", "recent": "#5aa872", "current": "#3a3f4b"}


def show(
    name: Annotated[str, typer.Argument(metavar="POLICY", help="A policy that needs no tokens: radial, for example.")],
    *,
    frames: Annotated[int, typer.Option(help="Latent frames of the keys.", min=1)] = 21,
    tokens: Annotated[int, typer.Option(help="Tokens of a latent frame.", min=1)] = 1560,
    grid: Annotated[
        str | None, typer.Option(metavar="ROWSxCOLUMNS", help="Rows and columns of a frame.", show_default="near 16:9")
    ] = None,
    block_frames: Annotated[
        int | None, typer.Option(help="Cached form: this many last frames ask.", show_default="all ask", min=1)
    ] = None,
    sinks: Annotated[int, typer.Option(help="Cached form: first frames that are the cache's sinks.", min=0)] = 1,
    head: Annotated[int, typer.Option(help="Which head, where heads differ.", min=0)] = 0,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a field; may be repeated.")
    ] = (),
    png: Annotated[Path | None, typer.Option(help="Where the picture goes.", show_default="NAME.png")] = None,
) -> None:
    """Draw a policy's mask, token by token, and say how much of dense attention it leaves.

    **Examples**

    `longtake attention show radial --frames 21 --tokens 1560`

    `longtake attention show radial --frames 12 --block-frames 3 --set decay_factor=0.2 --png strip.png`
    """
    from longtake.attention.policies import POLICIES, BlockPolicy, make_attention_policy

    policy = make_attention_policy({"policy": name, **_changes(set_)})
    if not policy.is_static:
        static = [key for key, cls in POLICIES.items() if cls().is_static]
        raise ValueError(
            f"attention policy {name!r} chooses blocks by the tokens of a model at work, so there is nothing to draw "
            f"before: these can be drawn: {', '.join(static)}."
        )
    if isinstance(policy, BlockPolicy):
        # What comes after the dense beginning is what the policy is about.
        policy = replace(policy, dense_blocks=0, dense_layers=0, dense_steps=0)
    geometry = make_geometry(frames, _grid(grid, tokens), block_frames=block_frames, num_sinks=sinks)
    plan = policy.plan(None, None, geometry)
    density = 1.0 if plan is None else plan.density()
    title = f"{name}: {frames} frames of {tokens} tokens, density {density:.3f}"
    if block_frames is not None:
        title += f", the last {block_frames} frames ask"
    path = png or Path(f"{name}.png")
    picture = draw(plan, geometry, title=title, head=head)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    out.print(title)
    out.print(f"picture: {path}", markup=False)


def make_geometry(
    num_frames: int, grid: tuple[int, int], *, block_frames: int | None = None, num_sinks: int = 1
) -> "AttentionGeometry":
    """A whole video, or the last block of a cache that holds a video from its first frame.

    Args:
        num_frames: Latent frames of the keys.
        grid: (rows, columns) of a frame.
        block_frames: Last frames that ask; None: all, in the bidirectional form.
        num_sinks: First frames that are sinks of the cache.

    Raises:
        ValueError: If more frames ask than there are.
    """
    from longtake.attention import AttentionGeometry, Segment

    if block_frames is None:
        return AttentionGeometry.bidirectional(num_frames, grid)
    if block_frames > num_frames:
        raise ValueError(
            f"--block-frames {block_frames} is more than --frames {num_frames}: use {num_frames} or less."
        )
    tokens, first = grid[0] * grid[1], num_frames - block_frames

    def role(frame: int) -> str:
        return "current" if frame >= first else "sink" if frame < num_sinks else "recent"

    return AttentionGeometry(
        frame_tokens=tokens,
        grid=grid,
        frames_per_block=block_frames,
        segments=tuple(
            Segment(frame=frame, position=float(frame), start=frame * tokens, length=tokens, role=role(frame))
            for frame in range(num_frames)
        ),
        query_frames=tuple(range(first, num_frames)),
        query_positions=tuple(map(float, range(first, num_frames))),
        block_index=first // block_frames,
    )


def draw(plan: "BlockPlan | None", geometry: "AttentionGeometry", *, title: str, head: int = 0) -> "Image":
    """Draw queries downwards, keys to the right, what is read in the colour of its role.

    Args:
        plan: The blocks; None: everything is read.
        geometry: Frames and roles.
        title: Above the picture.
        head: Whose blocks, where heads differ.

    Returns:
        A picture; a pixel is the token at its middle.

    Raises:
        ValueError: If there is no such head.
    """
    from PIL import Image, ImageDraw, ImageFont

    height = max(MIN_HEIGHT, round(WIDTH * geometry.num_queries / geometry.num_keys))
    mask = _colours(plan, geometry, height, head)
    picture = Image.new("RGB", (WIDTH + MARGIN + 14, height + 2 * MARGIN), "white")
    picture.paste(Image.fromarray(mask), (MARGIN, MARGIN + 20))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    pen.text((MARGIN, 10), title, fill="black", font=font)
    key_lines = [segment.start * WIDTH / geometry.num_keys for segment in geometry.segments]
    query_lines = [index * height / len(geometry.query_frames) for index in range(len(geometry.query_frames))]
    top, left = MARGIN + 20, MARGIN
    for lines, is_across in ((key_lines, True), (query_lines, False)):
        names = [segment.frame for segment in geometry.segments] if is_across else geometry.query_frames
        step = lines[1] if len(lines) > 1 else WIDTH
        every = max(1, round(LABEL_PIXELS / step)) if is_across else max(1, round(LABEL_PIXELS / 2 / step))
        for number, (place, frame) in enumerate(zip(lines, names, strict=True)):
            if step >= LINE_PIXELS and number:
                ends = (left + place, top, left + place, top + height) if is_across else None
                pen.line(ends or (left, top + place, left + WIDTH, top + place), fill="#c9ced8")
            if number % every == 0:
                where = (left + place + 2, top - 18) if is_across else (8, top + place)
                pen.text(where, str(frame), fill="#555555", font=font)
    place = left
    for text, colour in _legend(geometry):
        pen.text((place, top + height + 4), text, fill=colour, font=font)
        place += pen.textlength(text, font=font) + 16
    return picture.quantize(64)


def _legend(geometry: "AttentionGeometry") -> list[tuple[str, str]]:
    roles = dict.fromkeys(segment.role for segment in geometry.segments)
    named = [(role, COLOURS.get(role, OTHER)) for role in roles] if len(roles) > 1 else []
    return [("queries downwards, keys to the right, by frame", "#555555"), *named]


def _colours(plan: "BlockPlan | None", geometry: "AttentionGeometry", height: int, head: int) -> Any:
    """(height, WIDTH, 3), uint8."""
    import numpy as np
    import torch
    from PIL import ImageColor

    from longtake.attention.plan import block_of_tokens

    rows, columns = (
        ((torch.arange(size) + 0.5) * count / size).long()
        for size, count in ((height, geometry.num_queries), (WIDTH, geometry.num_keys))
    )
    is_read = torch.ones(height, WIDTH, dtype=torch.bool)
    if plan is not None:
        if head >= plan.num_heads:
            raise ValueError(f"--head {head} does not exist: heads 0 to {plan.num_heads - 1} are told apart.")
        blocks = []
        for edges, order, places in (
            (plan.q_edges, plan.q_perm, rows),
            (plan.k_edges, plan.k_perm, columns),
        ):
            of_place = block_of_tokens(edges, int(edges.reshape(-1)[-1]))
            of_place = of_place[head % len(of_place)]
            if order is not None:
                of_place = torch.empty_like(of_place).scatter_(0, order[head % len(order)], of_place)
            blocks.append(of_place[places])
        is_read = plan.block_mask[head % len(plan.block_mask)][blocks[0]][:, blocks[1]]
    ends = torch.tensor([segment.stop for segment in geometry.segments])
    of_segment = torch.searchsorted(ends, columns, right=True).tolist()
    roles = [geometry.segments[index].role for index in of_segment]
    shades = np.array([ImageColor.getrgb(COLOURS.get(role, OTHER)) for role in roles], dtype=np.uint8)
    empty = np.array(ImageColor.getrgb(UNREAD), dtype=np.uint8)
    return np.where(is_read.numpy()[..., None], shades[None], empty)


def _grid(text: str | None, tokens: int) -> tuple[int, int]:
    if text is None:
        rows = [count for count in range(1, tokens + 1) if tokens % count == 0]
        best = min(rows, key=lambda count: abs(tokens / count / count / ASPECT - 1))
        return best, tokens // best
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()) or int(rows) * int(columns) != tokens:
        raise ValueError(
            f"--grid {text!r}: write ROWSxCOLUMNS with a product of {tokens}, for example 30x52 for 1560."
        )
    return int(rows), int(columns)


def _changes(texts: list[str]) -> dict[str, Any]:
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {text!r}: write key=value, for example decay_factor=0.5.")
        changes[key] = yaml.safe_load(value)
    return changes


DTYPES = ("float32", "float16", "bfloat16", "float64")
SHAPE = re.compile(r"(\d+)(?:\D+)(\d+)(?:\D+)(\d+)(?:\D+)(\d+)(?:\D+)(\d+)")


def explain(
    shape: Annotated[
        str, typer.Option(metavar="B,LQ,LK,H,D", help="Samples, queries, keys, heads, size of a head.")
    ] = "1,4680,32760,12,128",
    device: Annotated[str, typer.Option(help="cpu, cuda, or another kind of device.")] = "cpu",
    capability: Annotated[
        str | None,
        typer.Option(metavar="MAJOR.MINOR", help="Compute capability of the device.", show_default="this machine's"),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    kv_heads: Annotated[
        int | None, typer.Option(help="Heads of keys and values.", show_default="as many as of queries", min=1)
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of pairs that a block plan keeps.", show_default="no plan", min=0, max=1),
    ] = None,
    block: Annotated[int, typer.Option(help="Size of the plan's blocks; 0: they vary.", min=0)] = 128,
    per_head: Annotated[bool, typer.Option("--per-head", help="The plan tells heads apart.")] = False,
    lse: Annotated[bool, typer.Option("--lse", help="The log-sum-exp is asked for.")] = False,
    allow_approx: Annotated[bool, typer.Option("--allow-approx", help="Quantised backends may be named.")] = False,
) -> None:
    """Say what every attention backend answers to a call, and which one is taken.

    **Examples**

    `longtake attention explain --shape 1,4680,32760,12,128 --density 0.4`

    `longtake attention explain --device cuda --capability 9.0 --dtype bfloat16 --density 0.4`
    """
    from longtake.attention import BACKENDS, dispatch

    request = _request(shape, device, capability, dtype, kv_heads, density, block, per_head, lse)
    rows = dispatch.explain(request, allow_approx=allow_approx)
    kind = "dense" if density is None else f"block plan, density {density:.2f}"
    out.print(
        f"{request.num_queries} queries, {request.num_keys} keys, {request.num_heads} heads x {request.head_dim}, "
        f"{dtype}, {device}{f' {capability}' if capability else ''}: {kind}"
    )
    out.print(_table(rows))
    chosen = next((row.name for row in rows if row.is_chosen), None)
    if chosen is not None:
        out.print(f"auto takes {chosen}")
        return
    able = [name for name in dispatch.preferences(request) if BACKENDS[name].supports(request).ok]
    taken = next((name for name in able if request.device in BACKENDS[name].verified_on), "none")
    out.print(f"auto finds no backend for this call here; where there is {device}, it takes {taken}")
    out.print(f"the fastest first, with all packages and unverified ones allowed: {', '.join(able) or 'none'}")


def _request(
    shape: str,
    device: str,
    capability: str | None,
    dtype: str,
    kv_heads: int | None,
    density: float | None,
    block: int,
    per_head: bool,
    lse: bool,
) -> "AttentionRequest":
    import torch

    from longtake.attention import AttentionRequest
    from longtake.attention.backends.base import PlanFacts

    sizes = SHAPE.fullmatch(shape.strip())
    if sizes is None or "0" in sizes.groups():
        raise ValueError(f"--shape={shape!r} is not B,LQ,LK,H,D: give five numbers above 0, such as 1,768,5376,4,64.")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype!r} is unknown; known: {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    batch, queries, keys, heads, head_dim = map(int, sizes.groups())
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(f"--kv-heads={kv_heads} does not divide the {heads} heads of --shape: give a divisor.")
    plan = None
    if density is not None:
        size = block or None
        plan = PlanFacts(
            density=density,
            num_heads=heads if per_head else 1,
            q_block=size,
            k_block=size,
            tile=float(min(block or queries, queries)),
        )
    return AttentionRequest(
        batch=batch,
        num_queries=queries,
        num_keys=keys,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=head_dim,
        dtype=getattr(torch, dtype),
        device=device,
        capability=_capability(device, capability),
        plan=plan,
        return_lse=lse,
    )


def _capability(device: str, given: str | None) -> tuple[int, int] | None:
    if given is not None:
        if re.fullmatch(r"\d+\.\d+", given) is None:
            raise ValueError(f"--capability={given!r} is not MAJOR.MINOR: give 9.0 for Hopper, 8.9 for Ada, ...")
        major, minor = given.split(".")
        return int(major), int(minor)
    import torch

    return torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None


def _table(rows: "tuple[Row, ...]") -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("backend", "can run", "why"):
        table.add_column(header, overflow="fold")
    for row in rows:
        can = Text("taken by auto", style="bold green") if row.is_chosen else Text("yes" if row.verdict.ok else "no")
        approximate = [] if row.exact or not row.verdict.ok else ["approximate"]
        why = "; ".join(text for text in (row.verdict.text, row.note, *approximate) if text)
        hint = f" {row.verdict.hint}" if row.verdict.hint else ""
        table.add_row(row.name, can, Text(f"{why}{'.' if hint else ''}{hint}"))
    return table


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Which attention backend a call gets on this machine, and what sparse policies leave of it.",
)
app.command("explain")(explain)
app.command("show", no_args_is_help=True)(show)
