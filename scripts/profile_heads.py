"""Tell a model's static heads from its dynamic ones, and write them down for the policy forcing_kv."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from longtake.scripts.console import out

DEFAULT_OUT = Path("heads.yaml")


def profile_heads(
    model: Annotated[str, Argument(metavar="MODEL", help="A model family or a diffusers folder.")],
    *,
    family: Annotated[str | None, Option(help="How a folder is run.", show_default="self_forcing")] = None,
    prompts: Annotated[
        Path | None, Option(help="Text file, one prompt per line.", show_default="moving scenes")
    ] = None,
    num_prompts: Annotated[int, Option(help="Videos to profile.")] = 4,
    seconds: Annotated[float, Option(help="Length of each, as long as the model was trained for.")] = 5.0,
    threshold: Annotated[float, Option(help="Share of attention on the near past that makes a head static.")] = 0.8,
    to: Annotated[Path, Option("--out", help="Head map to write.")] = DEFAULT_OUT,
) -> None:
    """Profile a model's attention heads for `forcing_kv`.

    Videos are rolled out with everything kept. A head is static if the last frame and the block itself have most of
    its attention, the first frames not counted; a head map lists the static heads of each layer.

    **Examples**

    `longtake profile-heads mini --out heads.yaml`

    `longtake generate "a red circle bouncing quickly over a navy striped background" --cache forcing_kv
    cache.head_map=heads.yaml`
    """
    from longtake.cache.policies.forcing_kv import format_head_map
    from longtake.configs.families import family_names
    from longtake.configs.run import ModelConfig
    from longtake.evaluation.head_profile import HeadProfile
    from longtake.evaluation.mini_world.scenes import describe, held_back_scenes
    from longtake.scripts.generate import read_prompts
    from longtake.scripts.running import load_pipeline

    if to.exists():
        raise ValueError(f"{to} exists already: choose another --out, nothing is written over.")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} is a share of attention: use a number between 0 and 1.")
    if model in family_names():
        pipe = load_pipeline(ModelConfig(family=model))
    else:
        pipe = load_pipeline(ModelConfig(family=family or "self_forcing", path=model))
    pipe.set_progress_bar_config(disable=True)
    if prompts is not None:
        texts = read_prompts(prompts)[:num_prompts]
    else:
        texts = [describe(scene) for scene in held_back_scenes(num_prompts, seed=0)]
    profile = HeadProfile()
    for seed, text in enumerate(texts):
        pipe(text, seconds=seconds, seed=seed, cache=profile.policy, output_type="latent")
    found = profile.head_map(threshold)
    comment = (
        f"Static heads of {model}: {threshold} or more of the attention goes to the last frame and the block itself.\n"
        f"From {len(texts)} videos of {seconds:g} s; {found.num_static} of {found.num_layers * found.num_heads} heads."
    )
    to.write_text(format_head_map(found, comment), encoding="utf-8")
    for layer, (row, heads) in enumerate(zip(profile.shares.tolist(), found.static, strict=True)):
        shares = " ".join(
            f"[bold]{share:.2f}[/]" if head in heads else f"{share:.2f}" for head, share in enumerate(row)
        )
        out.print(f"layer {layer:2}: {shares}")
    out.print(f"{found.num_static} static heads of {found.num_layers * found.num_heads}, written to {to}")
