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

    from longtake.attention import AttentionGeometry, BlockPlan
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
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field; may be repeated.")
    ] = None,
    path: Annotated[
        Path | None, typer.Option("--out", "--png", help="PNG file for a picture of the mask.", show_default="none")
    ] = None,
) -> None:
    """Print the share of dense attention that a policy leaves, and with --out draw its mask, token by token.

    **Examples**

    `longtake attention show radial --frames 21 --tokens 1560`

    `longtake attention show radial --frames 12 --block-frames 3 --set decay_factor=0.2 --out strip.png`
    """
    from longtake.attention.geometry import make_geometry
    from longtake.attention.policies import POLICIES, BlockPolicy, make_attention_policy

    policy = make_attention_policy({"policy": name, **_changes(set_ or [])})
    if not policy.is_static:
        static = [key for key, cls in POLICIES.items() if cls().is_static]
        raise ValueError(
            f"attention policy {name!r} chooses blocks by the tokens of a model at work, so there is nothing to draw "
            f"before: these can be drawn: {', '.join(static)}."
        )
    if isinstance(policy, BlockPolicy):
        # What comes after the dense beginning is what the policy is about.
        policy = replace(policy, dense_blocks=0, dense_layers=0, dense_steps=0)
    if block_frames is not None and block_frames > frames:
        raise ValueError(f"--block-frames {block_frames} is more than --frames {frames}: use {frames} or less.")
    geometry = make_geometry(frames, _grid(grid, tokens), block_frames=block_frames, num_sinks=sinks)
    plan = policy.plan(None, None, geometry)
    density = 1.0 if plan is None else plan.density
    title = f"{name}: {frames} frames of {tokens} tokens, density {density:.3f}"
    if block_frames is not None:
        title += f", the last {block_frames} frames ask"
    if plan is not None and head >= plan.num_heads:
        raise ValueError(f"--head {head} does not exist: heads 0 to {plan.num_heads - 1} are told apart.")
    out.print(title)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(plan, geometry, title=title, head=head).save(path, optimize=True)
        out.print(f"picture: {path}", markup=False)


def _draw(plan: "BlockPlan | None", geometry: "AttentionGeometry", *, title: str, head: int = 0) -> "Image":
    """Draw queries downwards, keys to the right, pairs that are read in the colour of the key's role."""
    from PIL import Image, ImageDraw, ImageFont

    height = max(MIN_HEIGHT, round(WIDTH * geometry.num_queries / geometry.num_keys))
    mask = _colours(plan, geometry, height, head)
    picture = Image.new("RGB", (WIDTH + MARGIN + 14, height + 2 * MARGIN), "white")
    picture.paste(Image.fromarray(mask), (MARGIN, MARGIN + 20))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    pen.text((MARGIN, 10), title, fill="black", font=font)
    top, left = MARGIN + 20, MARGIN
    key_step, query_step = WIDTH * geometry.frame_tokens / geometry.num_keys, height / len(geometry.query_frames)
    for number, segment in enumerate(geometry.segments):
        x = left + segment.start * WIDTH / geometry.num_keys
        if key_step >= LINE_PIXELS and number:
            pen.line((x, top, x, top + height), fill="#c9ced8")
        if number % max(1, round(LABEL_PIXELS / key_step)) == 0:
            pen.text((x + 2, top - 18), str(segment.frame), fill="#555555", font=font)
    for number, frame in enumerate(geometry.query_frames):
        y = top + number * query_step
        if query_step >= LINE_PIXELS and number:
            pen.line((left, y, left + WIDTH, y), fill="#c9ced8")
        if number % max(1, round(LABEL_PIXELS / 2 / query_step)) == 0:
            pen.text((8, y), str(frame), fill="#555555", font=font)
    roles = dict.fromkeys(segment.role for segment in geometry.segments)
    legend = {"queries downwards, keys to the right, by frame": "#555555"}
    if len(roles) > 1:
        legend |= {role: COLOURS.get(role, OTHER) for role in roles}
    for text, colour in legend.items():
        pen.text((left, top + height + 4), text, fill=colour, font=font)
        left += pen.textlength(text, font=font) + 16
    return picture.quantize(64)


def _colours(plan: "BlockPlan | None", geometry: "AttentionGeometry", height: int, head: int) -> Any:
    """(height, WIDTH, 3), uint8."""
    import numpy as np
    import torch
    from PIL import ImageColor

    rows, columns = (
        ((torch.arange(size) + 0.5) * count / size).long()
        for size, count in ((height, geometry.num_queries), (WIDTH, geometry.num_keys))
    )
    is_read = torch.ones(height, WIDTH, dtype=torch.bool)
    if plan is not None:
        masks = plan.to_dense_mask(rows, columns)
        is_read = masks[head % len(masks)]
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
    import torch

    from longtake.attention import BACKENDS, AttentionRequest, dispatch
    from longtake.attention.backends.base import PlanFacts

    sizes = _shape(shape, kv_heads)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype!r} is unknown; known: {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")
    plan = None
    if density is not None:
        plan = PlanFacts(
            density=density,
            num_heads=sizes["num_heads"] if per_head else 1,
            q_block=block or None,
            k_block=block or None,
            tile=float(min(block or sizes["num_queries"], sizes["num_queries"])),
        )
    request = AttentionRequest(
        batch=sizes["batch"],
        num_queries=sizes["num_queries"],
        num_keys=sizes["num_keys"],
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        dtype=getattr(torch, dtype),
        device=device,
        capability=_capability(device, capability),
        plan=plan,
        return_lse=lse,
    )
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
    taken = next(
        (
            name
            for name in dispatch.preferences(request)
            if BACKENDS[name].supports(request).ok and request.device in BACKENDS[name].verified_on
        ),
        "none",
    )
    out.print(f"auto finds no backend for this call here; where there is {device}, it takes {taken}")


def _shape(shape: str, kv_heads: int | None) -> dict[str, int]:
    """Sizes of a request from B,LQ,LK,H,D."""
    sizes = SHAPE.fullmatch(shape.strip())
    if sizes is None or "0" in sizes.groups():
        raise ValueError(f"--shape={shape!r} is not B,LQ,LK,H,D: give five numbers above 0, such as 1,768,5376,4,64.")
    names = ("batch", "num_queries", "num_keys", "num_heads", "head_dim")
    found = dict(zip(names, map(int, sizes.groups()), strict=True))
    heads = found["num_heads"]
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(f"--kv-heads={kv_heads} does not divide the {heads} heads of --shape: give a divisor.")
    return found | {"num_kv_heads": kv_heads or heads}


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
