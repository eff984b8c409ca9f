"""Make a video from a prompt, or one from each line of a file."""

import sys
from importlib.util import find_spec

if __name__ == "__main__" and not all(map(find_spec, ("typer", "torch", "longtake"))):
    sys.exit(
        "this Python lacks longtake's packages: run `make install`, then `.venv/bin/python scripts/generate.py ...`"
    )

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longtake.configs.loader import is_override, load_run
from longtake.configs.run import RunConfig, check_prompt
from longtake.scripts.console import EXIT_INTERRUPTED, err, run_app, stop_requests
from longtake.scripts.memory_plan import check_memory
from longtake.scripts.running import (
    check_settings,
    encode_and_free,
    go_on,
    load_pipeline,
    provenance,
    run_in_folder,
    start_session,
)

if TYPE_CHECKING:
    from longtake.pipelines import LongVideoPipeline

RUNS = Path("runs")
SLUG_LENGTH = 40


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT [KEY=VALUE ...]", help="What to show, then any settings by their dotted names."
        ),
    ] = None,
    *,
    seconds: Annotated[float | None, typer.Option(help="Length of the video.", show_default="60")] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Cache policy; `longtake policies` lists them.", show_default="the model's own, or attention_sink"
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="few_step or multi_step.", show_default="the model's own")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="dense, radial, light_forcing...; see configs/attention.", show_default="dense")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model family, NAME=FOLDER for one with its weights, or a FOLDER alone: it runs like Self-Forcing.",
            show_default="mini",
        ),
    ] = None,
    numerics: Annotated[
        str | None,
        typer.Option(help="upstream rounds bfloat16 where Self-Forcing's code does.", show_default="native"),
    ] = None,
    fast_vae: Annotated[
        Path | None,
        typer.Option(help="Small decoder in place of the VAE's: taew2_1.safetensors or .pth, for Wan 2.1."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show; for samplers with guidance.")] = None,
    init_video: Annotated[Path | None, typer.Option(help="Go on from the end of this video.")] = None,
    init_image: Annotated[
        Path | None, typer.Option(help="Go on from this image; for models that start from one.")
    ] = None,
    init_seconds: Annotated[
        float | None, typer.Option(help="Go on from the last so many seconds of --init-video.", show_default="all")
    ] = None,
    continuation_only: Annotated[
        bool | None, typer.Option("--continuation-only", help="Leave what it goes on from out of the video.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same video.", show_default="0")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file that describes the run.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder to make, or NAME.mp4 for a video beside its run folder NAME.", show_default="runs/..."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt per line: one run folder each; finished ones are skipped."),
    ] = None,
    contact_sheet: Annotated[
        bool | None, typer.Option("--contact-sheet/--no-contact-sheet", help="Also write contact_sheet.png.")
    ] = None,
    free_text_encoder: Annotated[
        bool, typer.Option("--free-text-encoder", help="Drop the text encoder once all prompts are encoded.")
    ] = False,
) -> None:
    """Make a video from a prompt.

    A run is a folder: the video, what it was made with, and saved states to resume and fork from.
    Nothing is ever overwritten. Ctrl-C finishes the file, saves the state and says how to go on.

    **Examples**

    `longtake generate "a red circle bouncing quickly over a navy striped background" --seconds 60`

    `longtake generate "a blue star circling quickly over a teal plain background" --cache full --seed 3 --out star`

    `longtake generate "a pink square swaying slowly over a grey plain background" cache.num_context_frames=15`

    `longtake generate "a lighthouse at dusk" --model self_forcing=./Self-Forcing --seconds 30`

    `longtake generate --config take.yaml` where take.yaml holds `prompt:`, `seconds:`, `cache:` and so on

    `longtake generate --prompts prompts.txt --out takes --seconds 10`

    `longtake generate "a red star swaying over a teal plain background" --init-video clip.mp4 --init-seconds 5`
    """
    texts, overrides = _split_words(words or [])
    options: dict[str, Any] = {
        "seconds": seconds,
        "cache": cache,
        "sampler": sampler,
        "attention": attention,
        "model": model,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "start": _start_options(init_image, init_video, init_seconds, continuation_only),
    }
    if contact_sheet is not None:
        overrides = [*overrides, f"output.contact_sheet={str(contact_sheet).lower()}"]
    if free_text_encoder:
        overrides = [*overrides, "model.free_text_encoder=true"]
    given = {"numerics": numerics, "fast_vae": fast_vae and str(fast_vae.absolute())}
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in given.items() if value is not None] + overrides
    if prompts is not None:
        if texts:
            raise ValueError(f"both a prompt ({texts[0]!r}) and --prompts are given: give one of the two")
        _generate_many(prompts, out, options=options, config=config, overrides=overrides)
        return
    if len(texts) > 1:
        raise ValueError(f"{len(texts)} prompts are given ({', '.join(map(repr, texts))}): put the prompt into quotes")
    options["prompt"] = texts[0] if texts else None
    run = load_run(config, options=options, overrides=overrides)
    path, deliver = _place(run, out)
    check_settings(run)
    check_memory(run)
    pipe = load_pipeline(run.model)
    with stop_requests() as should_stop:
        status = _make(pipe, run, path, should_stop=should_stop, deliver=deliver)
    if status != "finished":
        raise typer.Exit(EXIT_INTERRUPTED)


def _start_options(
    image: Path | None, video: Path | None, seconds: float | None, continuation_only: bool | None
) -> dict[str, Any] | None:
    """Put what a video goes on from as the key ``start`` has it; None where no option speaks of it."""
    values = {
        "image": image and str(image),
        "video": video and str(video),
        "seconds": seconds,
        "include": False if continuation_only else None,
    }
    return {key: value for key, value in values.items() if value is not None} or None


def _split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Tell prompts from overrides.

    Args:
        words: The command's free words.

    Returns:
        (prompts, ``key=value`` overrides).
    """
    return [word for word in words if not is_override(word)], [word for word in words if is_override(word)]


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: If the file cannot be read, has no prompts, or one is too long.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    texts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not texts:
        raise ValueError(f"{path} holds no prompts: write one per line")
    for text in texts:
        check_prompt(text)
    return texts


def _folder_names(texts: list[str]) -> list[str]:
    """Name a folder for every prompt: its first words, a hash of it, and a number where it is repeated.

    The name depends on nothing else in the list, so that lines may be added anywhere later.

    Args:
        texts: Prompts.
    """
    seen: Counter[str] = Counter()
    names = []
    for text in texts:
        seen[text] += 1
        repeat = f"-{seen[text]}" if seen[text] > 1 else ""
        names.append(f"{_slug(text)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{repeat}")
    return names


def _slug(text: str) -> str:
    """Turn a prompt's first words into a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:SLUG_LENGTH].strip("-") or "take"


def free_place(stem: Path) -> Path:
    """Return the first of STEM-1, STEM-2, ... where nothing is."""
    return next(path for number in count(1) if not (path := stem.with_name(f"{stem.name}-{number}")).exists())


def _place(run: RunConfig, out: Path | None) -> tuple[Path, Path | None]:
    """Choose the run folder, and the extra name of the video; refuse what is taken."""
    if out is None and run.output.folder is not None:
        out = Path(run.output.folder)
    if out is None:
        return free_place(RUNS / _slug(run.prompt)), None
    path, deliver = (out.with_suffix(""), out.absolute()) if out.suffix == ".mp4" else (out, None)
    for taken in (path, deliver):
        if taken is not None and taken.exists():
            from longtake.pipelines.run_folder import refuse_existing

            refuse_existing(taken)
    return path, deliver


def _make(
    pipe: "LongVideoPipeline",
    run: RunConfig,
    path: Path,
    *,
    should_stop: Callable[[], bool],
    deliver: Path | None = None,
) -> str:
    from longtake.pipelines.conditioning import start_record
    from longtake.pipelines.run_folder import RunFolder

    session = start_session(pipe, run)
    start = start_record(run, pipe.family)
    if start is not None:
        err.print(_described(start), markup=False)
    record = provenance(pipe, run.model) | {"deliver": deliver and str(deliver), "start": start}
    with RunFolder.create(path, config=run, record=record) as folder:
        return run_in_folder(folder, session, should_stop=should_stop).status


def _described(start: dict[str, Any]) -> str:
    part = f"{start['num_frames']} frames" if start["kind"] == "video" else "one frame"
    place = "begins with them" if start["is_included"] else "does not show them"
    return f"goes on from {start['file']}: its last {part} ({start['seconds']:.2f} s); the video {place}"


def _generate_many(
    prompts: Path, out: Path | None, *, options: dict[str, Any], config: Path | None, overrides: list[str]
) -> None:
    texts = read_prompts(prompts)
    runs = [load_run(config, options=options | {"prompt": text}, overrides=overrides) for text in texts]
    parent = out or Path(runs[0].output.folder or RUNS / prompts.stem)
    seen: Counter[str] = Counter()
    for index, text in enumerate(texts):
        # The same line again is asked for as another take of it.
        runs[index] = replace(runs[index], seed=runs[index].seed + seen[text])
        seen[text] += 1
    paths = [parent / name for name in _folder_names(texts)]
    todo = [(run, path) for run, path in zip(runs, paths, strict=True) if not _is_finished(run, path)]
    err.print(f"{len(texts)} prompts, {len(texts) - len(todo)} finished already, {len(todo)} to make in {parent}")
    if not todo:
        return
    check_settings(todo[0][0])
    check_memory(todo[0][0])
    pipe = load_pipeline(todo[0][0].model)
    encode_and_free(pipe, [run for run, _ in todo])
    with stop_requests() as should_stop:
        for run, path in todo:
            err.print(f"{run.prompt}", style="bold", markup=False)
            status = go_on(path, pipe, should_stop=should_stop) if path.exists() else ""
            status = status or _make(pipe, run, path, should_stop=should_stop)
            if status != "finished" or should_stop():
                raise typer.Exit(EXIT_INTERRUPTED)


def _is_finished(run: RunConfig, path: Path) -> bool:
    """Whether a folder holds this very run, finished; anything else there that is not this run is refused."""
    if not path.exists():
        return False
    from longtake.pipelines.run_folder import FINISHED, RunFolder

    folder = RunFolder(path)
    folder.check()
    same = replace(folder.config, output=run.output)
    if same != run:
        raise ValueError(f"{path} holds this prompt with other settings: use another --out")
    return folder.status == FINISHED


if __name__ == "__main__":
    program = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    program.callback()(lambda: None)  # so that the command keeps its name
    program.command(no_args_is_help=True)(generate)
    sys.exit(run_app(program, ["generate", *sys.argv[1:]]))
