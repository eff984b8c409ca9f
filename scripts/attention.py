"""``longtake attention``: which backend a call gets on this machine, and what a policy leaves of it."""

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from longtake.configs.fields import did_you_mean
from longtake.scripts.attention_show import show
from longtake.scripts.console import out

if TYPE_CHECKING:
    from longtake.attention import AttentionRequest
    from longtake.attention.dispatch import Row

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
    from longtake.attention import EXECUTORS, dispatch

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
    able = [name for name in dispatch.preferences(request) if EXECUTORS[name].supports(request).ok]
    taken = next((name for name in able if request.device in EXECUTORS[name].verified_on), "none")
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
    from longtake.attention.requests import PlanFacts

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
