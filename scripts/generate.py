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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from longtake.configs.loader import is_override, load_run
from longtake.configs.run import RunConfig, check_prompt
from longtake.scripts.console import EXIT_INTERRUPTED, err, run_app, stop_requests, takes_options

_RUNS = Path("runs")
_SLUG_LENGTH = 40
_Job = tuple[RunConfig, Path, Path | None]


@dataclass(frozen=True, kw_only=True)
class _Options:
    words: Annotated[
        list[str] | None,
        Argument(metavar="PROMPT [KEY=VALUE ...]", help="What to show, then any settings by their dotted names."),
    ] = None
    seconds: Annotated[float | None, Option(help="Length of the video.", show_default="60")] = None
    cache: Annotated[
        str | None,
        Option(
            help="Cache policy; `longtake policies` lists them.", show_default="the model's own, or attention_sink"
        ),
    ] = None
    sampler: Annotated[str | None, Option(help="few_step or multi_step.", show_default="the model's own")] = None
    attention: Annotated[
        str | None, Option(help="dense, radial, light_forcing...; see configs/attention.", show_default="dense")
    ] = None
    model: Annotated[
        str | None,
        Option(
            help="A model family, NAME=FOLDER for one with its weights, or a FOLDER alone: it runs like Self-Forcing.",
            show_default="mini",
        ),
    ] = None
    numerics: Annotated[
        str | None, Option(help="upstream rounds bfloat16 where Self-Forcing's code does.", show_default="native")
    ] = None
    fast_vae: Annotated[
        Path | None, Option(help="Small decoder in place of the VAE's: taew2_1.safetensors or .pth, for Wan 2.1.")
    ] = None
    negative_prompt: Annotated[str | None, Option(help="What not to show; for samplers with guidance.")] = None
    init_video: Annotated[Path | None, Option(help="Continue the end of this video.")] = None
    init_image: Annotated[Path | None, Option(help="Continue this image; for models that start from one.")] = None
    init_seconds: Annotated[
        float | None, Option(help="Continue the last so many seconds of --init-video.", show_default="all")
    ] = None
    continuation_only: Annotated[
        bool | None, Option("--continuation-only", help="Leave what it continues out of the video.")
    ] = None
    seed: Annotated[int | None, Option(help="Same seed, same video.", show_default="0")] = None
    config: Annotated[Path | None, Option(help="YAML file that describes the run.")] = None
    out: Annotated[
        Path | None,
        Option(
            help="Run folder to make, or NAME.mp4 for a video beside its run folder NAME.", show_default="runs/..."
        ),
    ] = None
    prompts: Annotated[
        Path | None, Option(help="Text file, one prompt per line: one run folder each; finished ones are skipped.")
    ] = None
    contact_sheet: Annotated[
        bool | None, Option("--contact-sheet/--no-contact-sheet", help="Also write contact_sheet.png.")
    ] = None
    free_text_encoder: Annotated[
        bool | None, Option("--free-text-encoder", help="Drop the text encoder once all prompts are encoded.")
    ] = None


@takes_options(_Options)
def generate(given: _Options) -> None:
    """Make a video from a prompt.

    A run is a folder: the video, what it was made with, and checkpoints to resume and fork from.
    Nothing is ever overwritten. Ctrl-C finishes the file, saves a checkpoint and says how to resume.

    **Examples**

    `longtake generate "a red circle bouncing quickly over a navy striped background" --seconds 60`

    `longtake generate "a blue star circling quickly over a teal plain background" --cache full --seed 3 --out star`

    `longtake generate "a pink square swaying slowly over a grey plain background" cache.num_context_frames=15`

    `longtake generate "a lighthouse at dusk" --model self_forcing=./Self-Forcing --seconds 30`

    `longtake generate --config take.yaml` where take.yaml holds `prompt:`, `seconds:`, `cache:` and so on

    `longtake generate --prompts prompts.txt --out takes --seconds 10`

    `longtake generate "a red star swaying over a teal plain background" --init-video clip.mp4 --init-seconds 5`
    """
    top = ("seconds", "cache", "sampler", "attention", "model", "negative_prompt", "seed")
    dotted = {
        "model.numerics": given.numerics,
        "model.fast_vae": given.fast_vae and given.fast_vae.absolute(),
        "model.free_text_encoder": given.free_text_encoder,
        "output.contact_sheet": given.contact_sheet,
        "start.image": given.init_image,
        "start.video": given.init_video,
        "start.seconds": given.init_seconds,
        "start.include": False if given.continuation_only else None,
    }
    texts = [word for word in given.words or () if not is_override(word)]
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in dotted.items() if value is not None]
    overrides += [word for word in given.words or () if is_override(word)]
    if given.prompts is not None and texts:
        raise ValueError(f"both a prompt ({texts[0]!r}) and --prompts are given: give one of the two")
    if len(texts) > 1:
        raise ValueError(f"{len(texts)} prompts are given ({', '.join(map(repr, texts))}): put the prompt into quotes")
    if given.prompts is not None:
        texts = read_prompts(given.prompts)
    options = {key: getattr(given, key) for key in top} | {"prompt": texts[0] if texts else None}
    run = load_run(given.config, options=options, overrides=overrides)
    out = given.out or (Path(run.output.folder) if run.output.folder else None)
    if given.prompts is None:
        _make_all([(run, *_place(run, out))])
    else:
        _make_all(_unfinished(run, texts, out or _RUNS / given.prompts.stem))


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; empty lines and lines that begin with # are left out."""
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


def _slug(text: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:_SLUG_LENGTH].strip("-") or "take"


def _folder_name(text: str, repeat: int) -> str:
    """First words of a prompt, a hash of it, and a number where it is repeated; lines may be added anywhere later."""
    number = f"-{repeat + 1}" if repeat else ""
    return f"{_slug(text)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{number}"


def _place(run: RunConfig, out: Path | None) -> tuple[Path, Path | None]:
    """Choose the run folder, and the extra name of the video; refuse what is taken."""
    from longtake.pipelines.run_folder import free_place, refuse_existing

    if out is None:
        return free_place(_RUNS / _slug(run.prompt)), None
    path, deliver = (out.with_suffix(""), out.absolute()) if out.suffix == ".mp4" else (out, None)
    for taken in (path, deliver or path):
        refuse_existing(taken)
    return path, deliver


def _unfinished(template: RunConfig, texts: list[str], parent: Path) -> list[_Job]:
    from longtake.pipelines.run_folder import FINISHED, RunFolder

    seen: Counter[str] = Counter()
    todo: list[_Job] = []
    for text in texts:
        # The same line again is another video of it.
        run = replace(template, prompt=text, seed=template.seed + seen[text])
        path = parent / _folder_name(text, seen[text])
        seen[text] += 1
        if path.exists():
            folder = RunFolder(path)
            folder.check()
            if replace(folder.config, output=run.output) != run:
                raise ValueError(f"{path} holds this prompt with other settings: use another --out")
            if folder.status == FINISHED:
                continue
        todo.append((run, path, None))
    err.print(f"{len(texts)} prompts, {len(texts) - len(todo)} finished already, {len(todo)} to make in {parent}")
    return todo


def _make_all(todo: list[_Job]) -> None:
    """Make runs with one model; a folder that is begun is resumed."""
    if not todo:
        return
    from longtake.pipelines.run_folder import FINISHED, RunFolder
    from longtake.pipelines.run_video import start_record
    from longtake.scripts import running

    running.check_settings(todo[0][0])
    pipe = running.load_pipeline(todo[0][0].model)
    running.encode_and_free(pipe, [run for run, *_ in todo])
    with stop_requests() as should_stop:
        for run, path, deliver in todo:
            if should_stop():
                raise Exit(EXIT_INTERRUPTED)
            if len(todo) > 1:
                err.print(run.prompt, style="bold", markup=False)
            if RunFolder(path).config_path.exists():
                status = running.resume_run(path, pipe, should_stop=should_stop)
            else:
                rollout = running.start_rollout(pipe, run)
                start = start_record(run, pipe.family)
                if start is not None:
                    err.print(_described(start), markup=False)
                record = running.provenance(pipe, run.model) | {"deliver": deliver and str(deliver), "start": start}
                with RunFolder.create(path, config=run, record=record) as folder:
                    status = running.run_in_folder(folder, rollout, should_stop=should_stop)
            if status != FINISHED:
                raise Exit(EXIT_INTERRUPTED)


def _described(start: dict[str, Any]) -> str:
    part = f"{start['num_frames']} frames" if start["kind"] == "video" else "one frame"
    place = "begins with them" if start["is_included"] else "does not show them"
    return f"continues {start['file']}: its last {part} ({start['seconds']:.2f} s); the video {place}"


if __name__ == "__main__":
    from longtake.scripts.main import app

    sys.exit(run_app(app, ["generate", *sys.argv[1:]]))
