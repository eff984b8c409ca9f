"""``longtake attention``: which backend a call gets on this machine, and what a policy leaves of it."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from rich.table import Table
from rich.text import Text
from typer import Argument, Option, Typer

from longtake.configs.fields import did_you_mean
from longtake.scripts.console import out, takes_options

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.attention import AttentionGeometry, AttentionRequest, BlockPlan, SparsePolicy
    from longtake.attention.dispatch import Row

ASPECT = 832 / 480  # of a frame whose rows and columns are not said
WIDTH = 880  # pixels of all keys
MIN_HEIGHT = 120
DPI = 100
LABEL_PIXELS = 44  # between two numbers of frames
UNREAD = "#f1f3f7"
OTHER = "#9a6fc0"
COLOURS = {"sink": "#3f78c4", "recent": "#5aa872", "current": "#3a3f4b"}
DTYPES = ("float32", "float16", "bfloat16", "float64")

app = Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Attention backends of this machine, and sparse attention policies.",
)


@dataclass(frozen=True, kw_only=True)
class _Call:
    shape: Annotated[str, Option(metavar="B,LQ,LK,H,D", help="Samples, queries, keys, heads, size of a head.")] = (
        "1,4680,32760,12,128"
    )
    device: Annotated[str, Option(help="cpu, cuda, or another kind of device.")] = "cpu"
    capability: Annotated[
        str | None,
        Option(metavar="MAJOR.MINOR", help="Compute capability of the device.", show_default="this machine's"),
    ] = None
    dtype: Annotated[str, Option(help=f"{', '.join(DTYPES)}.")] = "float32"
    kv_heads: Annotated[
        int | None, Option(help="Heads of keys and values.", show_default="as many as of queries", min=1)
    ] = None
    density: Annotated[
        float | None, Option(help="Share of pairs that a block plan keeps.", show_default="no plan", min=0, max=1)
    ] = None
    block: Annotated[int, Option(help="Size of the plan's blocks; 0: they vary.", min=0)] = 128
    per_head: Annotated[bool, Option("--per-head", help="The plan tells heads apart.")] = False
    lse: Annotated[bool, Option("--lse", help="The log-sum-exp is asked for.")] = False
    allow_approx: Annotated[bool, Option("--allow-approx", help="Quantised backends may be named.")] = False

    def request(self) -> "AttentionRequest":
        import torch

        from longtake.attention import AttentionRequest
        from longtake.attention.backends.base import PlanFacts

        batch, queries, keys, heads, head_dim = self._sizes()
        if self.dtype not in DTYPES:
            known = f"known: {', '.join(DTYPES)}.{did_you_mean(self.dtype, DTYPES)}"
            raise ValueError(f"--dtype={self.dtype!r} is unknown; {known}")
        plan, size = None, self.block or None
        if self.density is not None:
            tile = float(min(size or queries, queries))
            num_maps = heads if self.per_head else 1
            plan = PlanFacts(density=self.density, num_heads=num_maps, q_block=size, k_block=size, tile=tile)
        return AttentionRequest(
            batch=batch,
            num_queries=queries,
            num_keys=keys,
            num_heads=heads,
            num_kv_heads=self.kv_heads or heads,
            head_dim=head_dim,
            dtype=getattr(torch, self.dtype),
            device=self.device,
            capability=self._capability(),
            plan=plan,
            return_lse=self.lse,
        )

    def _sizes(self) -> tuple[int, ...]:
        sizes = re.fullmatch(r"\D+".join([r"(\d+)"] * 5), self.shape.strip())
        if sizes is None or "0" in sizes.groups():
            remedy = "give five numbers above 0, such as 1,768,5376,4,64."
            raise ValueError(f"--shape={self.shape!r} is not B,LQ,LK,H,D: {remedy}")
        heads = int(sizes[4])
        if self.kv_heads is not None and heads % self.kv_heads:
            raise ValueError(
                f"--kv-heads={self.kv_heads} does not divide the {heads} heads of --shape: give a divisor."
            )
        return tuple(map(int, sizes.groups()))

    def _capability(self) -> tuple[int, int] | None:
        import torch

        if self.capability is None:
            is_here = self.device == "cuda" and torch.cuda.is_available()
            return torch.cuda.get_device_capability() if is_here else None
        major, dot, minor = self.capability.partition(".")
        if not (dot and major.isdigit() and minor.isdigit()):
            remedy = "give 9.0 for Hopper, 8.9 for Ada, ..."
            raise ValueError(f"--capability={self.capability!r} is not MAJOR.MINOR: {remedy}")
        return int(major), int(minor)


@app.command("explain")
@takes_options(_Call)
def _explain(call: _Call) -> None:
    """Say what every attention backend answers to a call, and which one is taken.

    **Examples**

    `longtake attention explain --shape 1,4680,32760,12,128 --density 0.4`

    `longtake attention explain --device cuda --capability 9.0 --dtype bfloat16 --density 0.4`
    """
    from longtake.attention import BACKENDS, dispatch

    request = call.request()
    rows = dispatch.explain(request, allow_approx=call.allow_approx)
    kind = "dense" if call.density is None else f"block plan, density {call.density:.2f}"
    out.print(
        f"{request.num_queries} queries, {request.num_keys} keys, {request.num_heads} heads x {request.head_dim}, "
        f"{call.dtype}, {call.device}{f' {call.capability}' if call.capability else ''}: {kind}"
    )
    out.print(_table(rows))
    chosen = next((row.name for row in rows if row.is_chosen), None)
    if chosen is not None:
        out.print(f"auto takes {chosen}")
        return
    able = (BACKENDS[name] for name in dispatch.preferences(request))
    taken = [cls.name for cls in able if cls.supports(request).ok and request.device in cls.verified_on]
    where = f"where there is {call.device}, it takes {taken[0] if taken else 'none'}"
    out.print(f"auto finds no backend for this call here; {where}")


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


@dataclass(frozen=True, kw_only=True)
class _Mask:
    name: Annotated[str, Argument(metavar="POLICY", help="A policy that needs no tokens: radial, for example.")]
    frames: Annotated[int, Option(help="Latent frames of the keys.", min=1)] = 21
    tokens: Annotated[int, Option(help="Tokens of a latent frame.", min=1)] = 1560
    grid: Annotated[
        str | None, Option(metavar="ROWSxCOLUMNS", help="Rows and columns of a frame.", show_default="near 16:9")
    ] = None
    block_frames: Annotated[
        int | None, Option(help="Cached form: this many last frames ask.", show_default="all ask", min=1)
    ] = None
    sinks: Annotated[int, Option(help="Cached form: first frames that are the cache's sinks.", min=0)] = 1
    head: Annotated[int, Option(help="Head to draw, where heads differ.", min=0)] = 0
    set_: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Change a field; may be repeated.")
    ] = None
    path: Annotated[
        Path | None, Option("--out", "--png", help="PNG file for a picture of the mask.", show_default="none")
    ] = None

    def geometry(self) -> "AttentionGeometry":
        from longtake.attention.geometry import make_geometry

        if self.block_frames is not None and self.block_frames > self.frames:
            raise ValueError(
                f"--block-frames {self.block_frames} is more than --frames {self.frames}: use {self.frames} or less."
            )
        return make_geometry(self.frames, self._grid(), block_frames=self.block_frames, num_sinks=self.sinks)

    def _grid(self) -> tuple[int, int]:
        if self.grid is None:
            counts = [count for count in range(1, self.tokens + 1) if self.tokens % count == 0]
            rows = min(counts, key=lambda count: abs(self.tokens / count / count / ASPECT - 1))
            return rows, self.tokens // rows
        rows, _, columns = self.grid.partition("x")
        if not (rows.isdigit() and columns.isdigit()) or int(rows) * int(columns) != self.tokens:
            remedy = f"write ROWSxCOLUMNS with a product of {self.tokens}, for example 30x52 for 1560."
            raise ValueError(f"--grid {self.grid!r}: {remedy}")
        return int(rows), int(columns)

    def policy(self) -> "SparsePolicy":
        from longtake.attention import make_attention_policy

        settings = {"policy": self.name}
        for text in self.set_ or []:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise ValueError(f"--set {text!r}: write key=value, for example decay_factor=0.5.")
            settings[key] = yaml.safe_load(value)
        return make_attention_policy(settings)


@app.command("show", no_args_is_help=True)
@takes_options(_Mask)
def _show(mask: _Mask) -> None:
    """Print the share of dense attention that a policy leaves, and with --out draw its mask, token by token.

    **Examples**

    `longtake attention show radial --frames 21 --tokens 1560`

    `longtake attention show radial --frames 12 --block-frames 3 --set decay_factor=0.2 --out strip.png`
    """
    from longtake.attention.policies import POLICIES, BlockPolicy

    policy = mask.policy()
    if not policy.is_static:
        static = [key for key, cls in POLICIES.items() if cls.is_static]
        raise ValueError(
            f"attention policy {mask.name!r} chooses blocks by the tokens of a model at work, so there is nothing to "
            f"draw before: these can be drawn: {', '.join(static)}."
        )
    if isinstance(policy, BlockPolicy):
        # What comes after the dense beginning is what the policy is about.
        policy = replace(policy, dense_blocks=0, dense_layers=0, dense_steps=0)
    geometry = mask.geometry()
    plan = policy.plan(None, None, geometry)
    title = f"{mask.name}: {mask.frames} frames of {mask.tokens} tokens, density {plan.density if plan else 1.0:.3f}"
    if mask.block_frames is not None:
        title += f", the last {mask.block_frames} frames ask"
    if plan is not None and mask.head >= plan.num_heads:
        raise ValueError(f"--head {mask.head} does not exist: heads 0 to {plan.num_heads - 1} are told apart.")
    out.print(title)
    if mask.path is not None:
        mask.path.parent.mkdir(parents=True, exist_ok=True)
        _draw(plan, geometry, mask.path, title=title, head=mask.head)
        out.print(f"picture: {mask.path}", markup=False)


def _draw(plan: "BlockPlan | None", geometry: "AttentionGeometry", path: Path, *, title: str, head: int) -> None:
    """Draw queries downwards, keys to the right, pairs that are read in the colour of the key's role."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = max(MIN_HEIGHT, round(WIDTH * geometry.num_queries / geometry.num_keys))
    figure = Figure(figsize=((WIDTH + 100) / DPI, (height + 140) / DPI), dpi=DPI, layout="constrained")
    axis = figure.add_subplot()
    extent = (0, geometry.num_keys, geometry.num_queries, 0)
    palette = ListedColormap([UNREAD, *(COLOURS.get(role, OTHER) for role in _roles(geometry))])
    codes = _codes(plan, geometry, height, head).numpy()
    axis.imshow(codes, palette, vmin=0, vmax=palette.N - 1, extent=extent, aspect="auto", interpolation="nearest")
    every = max(1, round(LABEL_PIXELS * geometry.num_keys / geometry.frame_tokens / WIDTH))
    keys, queries = geometry.segments[::every], range(0, len(geometry.query_frames), every)
    axis.set_xticks([segment.start for segment in keys], [str(segment.frame) for segment in keys])
    axis.set_yticks([i * geometry.frame_tokens for i in queries], [str(geometry.query_frames[i]) for i in queries])
    axis.set(title=title, xlabel="keys by frame", ylabel="queries by frame")
    if len(_roles(geometry)) > 1:
        handles = [Patch(color=COLOURS.get(role, OTHER), label=role) for role in _roles(geometry)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, format="png")


def _roles(geometry: "AttentionGeometry") -> list[str]:
    return list(dict.fromkeys(segment.role for segment in geometry.segments))


def _codes(plan: "BlockPlan | None", geometry: "AttentionGeometry", height: int, head: int) -> "Tensor":
    """(height, WIDTH): 0 where nothing is read, else the number of the key's role, from 1."""
    import torch

    rows, columns = (
        ((torch.arange(size) + 0.5) * count / size).long()
        for size, count in ((height, geometry.num_queries), (WIDTH, geometry.num_keys))
    )
    roles = _roles(geometry)
    of_key = torch.tensor([1 + roles.index(segment.role) for segment in geometry.segments])
    of_key = of_key.repeat_interleave(torch.tensor(geometry.key_lengths))[columns].expand(height, -1)
    if plan is None:
        return of_key
    masks = plan.to_dense_mask(rows, columns)
    return of_key * masks[head % len(masks)]
