"""List the cache policies, or show one as YAML."""

from dataclasses import fields
from typing import Annotated

import typer
import yaml
from rich.table import Table

from longtake.scripts.console import out, script


def policies(
    name: Annotated[str | None, typer.Argument(help="Show this one's preset as YAML.", show_default=False)] = None,
) -> None:
    """List the cache policies with their settings and sources.

    **Examples**

    `longtake policies`

    `longtake policies attention_sink > my_cache.yaml`
    """
    from longtake.cache import POLICIES
    from longtake.configs.fields import choose
    from longtake.configs.loader import load_preset

    if name is not None:
        choose(POLICIES, name, what="cache policy")
        out.print(yaml.safe_dump(load_preset("cache", name), sort_keys=False).rstrip(), markup=False)
        return
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    for heading in ("policy", "what it keeps", "settings", "source"):
        table.add_column(heading, overflow="fold")
    for policy, cls in POLICIES.items():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        preset = load_preset("cache", policy)
        settings = "\n".join(f"{field.name}={preset.get(field.name, field.default)}" for field in fields(cls))
        table.add_row(policy, summary, settings or "-", cls.source)
    out.print(table)


if __name__ == "__main__":
    script("policies")
