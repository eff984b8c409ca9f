"""Which heads of a model look only at what is near: maps that are shipped, profiled or published."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

PROFILER = "make one with 'longtake profile-heads MODEL'"


@dataclass(frozen=True)
class HeadMap:
    """Heads by what they need.

    Attributes:
        static: Per layer the heads to which the near past is enough; all others are dynamic.
        num_heads: Heads per layer.
    """

    static: tuple[tuple[int, ...], ...]
    num_heads: int

    @property
    def num_layers(self) -> int:
        """Self-attention layers."""
        return len(self.static)

    @property
    def num_static(self) -> int:
        """Static heads of all layers."""
        return sum(map(len, self.static))

    def __post_init__(self) -> None:
        for layer, heads in enumerate(self.static):
            if len(set(heads)) != len(heads) or not all(0 <= head < self.num_heads for head in heads):
                raise ValueError(
                    f"static heads {list(heads)} of layer {layer} have to differ and lie in 0 to {self.num_heads - 1}."
                )

    def dynamic(self, layer: int) -> tuple[int, ...]:
        """The other heads of a layer."""
        return tuple(head for head in range(self.num_heads) if head not in self.static[layer])


def shipped_maps() -> dict[str, HeadMap]:
    """Maps that come with the package, by name."""
    folder = files("longtake.configs").joinpath("heads")
    texts = {entry.name: entry.read_text("utf-8") for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): parse_head_map(yaml.safe_load(texts[name]), name) for name in sorted(texts)}


def find_head_map(name: str, num_layers: int, num_heads: int) -> HeadMap:
    """Look a map up.

    Args:
        name: ``auto`` for the shipped map of a model of this shape, a shipped map's name, or a YAML or JSON file.
        num_layers: Self-attention layers of the model.
        num_heads: Heads per layer.

    Raises:
        ValueError: If there is none, or it belongs to a model of another shape.
    """
    shape = f"{num_layers} layers of {num_heads} heads"
    shipped = shipped_maps()
    if name == "auto":
        fitting = [
            known for known in shipped.values() if (known.num_layers, known.num_heads) == (num_layers, num_heads)
        ]
        if not fitting:
            raise ValueError(
                f"no head map is shipped for a model of {shape}: {PROFILER} and set head_map to the file."
            )
        return fitting[0]
    if name in shipped:
        found = shipped[name]
    elif Path(name).is_file():
        found = parse_head_map(yaml.safe_load(Path(name).read_text(encoding="utf-8")), name)
    else:
        raise ValueError(f"head_map={name!r} is no file and none of: auto, {', '.join(shipped)}; {PROFILER}.")
    if (found.num_layers, found.num_heads) != (num_layers, num_heads):
        raise ValueError(
            f"head_map={name!r} is of {found.num_layers} layers of {found.num_heads} heads, this model has {shape}: "
            f"{PROFILER}."
        )
    return found


def parse_head_map(content: Any, name: str) -> HeadMap:
    """Read ``num_heads`` and ``static_heads`` (a list per layer), or the file format of the Forcing-KV repository.

    Raises:
        ValueError: If the content is neither.
    """
    if isinstance(content, Mapping) and isinstance(content.get("static_heads"), list) and "num_heads" in content:
        return HeadMap(tuple(map(tuple, content["static_heads"])), int(content["num_heads"]))
    if isinstance(content, Mapping) and isinstance(content.get("layers"), list) and "num_heads" in content:
        layers = sorted(content["layers"], key=lambda layer: layer["layer_idx"])
        return HeadMap(tuple(tuple(layer["local_head"]) for layer in layers), int(content["num_heads"]))
    raise ValueError(f"{name} is no head map: it needs num_heads and static_heads, a list of heads per layer.")


def format_head_map(found: HeadMap, comment: str) -> str:
    """A map as YAML, under a comment."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"num_heads: {found.num_heads}", "static_heads:"]
    return "\n".join([*lines, *(f"  - {list(heads)}" for heads in found.static)]) + "\n"
