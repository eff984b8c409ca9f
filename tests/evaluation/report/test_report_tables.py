"""Tables for a Markdown page: moments, pairing, what is bold, costs, references, sections, and the command."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.metrics import judge
from longtake.evaluation.mini_world.scenes import describe, held_back_scenes
from longtake.evaluation.records import ManifestLine, RunScores, VideoScores, write_json
from longtake.evaluation.report.tables import (
    TITLES,
    choose_columns,
    moment_tables,
    replace_section,
    write_curves,
)
from longtake.evaluation.results import run_record
from longtake.evaluation.running.suites import PROMPT_SEED
from longtake.scripts.console import run_app
from longtake.scripts.main import app

FPS, WINDOW = 16, 80
NUM_PROMPTS = 12
CAPTIONS = [describe(scene) for scene in held_back_scenes(NUM_PROMPTS, seed=PROMPT_SEED)]


def build(label, *, slope, num_windows=12, costs=None):
    """Two seeds of every prompt: a PSNR that falls, motion that grows, shapes that depend on the prompt alone."""
    rng = np.random.default_rng(len(label))
    specs = {name: MetricSpec(name=name, higher_is_better=True) for name in TITLES}
    specs["proxy/flow[flow=x]"] = MetricSpec(name="proxy/flow[flow=x]", higher_is_better=None)
    videos = []
    for prompt in range(NUM_PROMPTS):
        for seed in range(2):
            values = {name: np.ones(num_windows) for name in specs}
            values["judge/shape"] *= prompt % 2
            values["judge/background_psnr"] = 30 + slope * np.arange(num_windows) + rng.normal(size=num_windows)
            values["judge/background_psnr"][0] = np.nan
            values["judge/motion_magnitude"] *= (1 + prompt) * (1 + 0.05 * slope * np.arange(num_windows))
            line = ManifestLine(
                id=f"p{prompt:04d}-{seed}",
                file="v.mp4",
                prompt=CAPTIONS[prompt],
                prompt_index=prompt,
                seed_index=seed,
                seed=10 * prompt + seed,
                num_frames=num_windows * WINDOW,
                fps=FPS,
            )
            scores = {name: score(row) for name, row in values.items()}
            videos.append(VideoScores(video=line, scores=scores))
    return RunScores(label=label, specs=specs, videos=videos, costs=costs or {})


def score(row):
    windows = tuple(
        Window(start_frame=index * WINDOW, num_frames=WINDOW, value=None if np.isnan(value) else float(value))
        for index, value in enumerate(row)
    )
    return Score(value=float(np.nanmean(row)), windows=windows)


DENSE = build("dense", slope=-1.0, costs={"attention_density": 1.0, "ms_per_block": 1234.5, "kv_mb": 5.75})
SPARSE = build("sparse", slope=0.0, costs={"attention_density": 0.4912, "ms_per_block": 61.04})
SHORT = build("short", slope=0.0, num_windows=6)
RUNS = (DENSE, SPARSE, SHORT)
LEVELS = {
    "true scene": {f"judge/{name}": 0.9 for name in ("shape", "colour", "background", "texture", "motion")}
    | {"judge/camera": 0.6, "judge/motion_magnitude": 1.0}
}


def tables(runs=RUNS, *, moments=(5, 30, 60, 120), columns=None, **options):
    columns = choose_columns(runs, None) if columns is None else columns
    return moment_tables(runs, baseline="dense", moments=moments, columns=columns, **options)


def rows(text, label):
    """{column: cell} of a policy's rows, in order."""
    found, head = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| policy"):
            head = cells
        elif line.startswith(f"| {label} "):
            found.append(dict(zip(head, cells, strict=True)))
    return found


def test_levels_and_differences_at_every_moment_that_was_reached():
    text = tables()
    assert text.startswith("Videos per policy: dense 24, sparse 24, short 24.\n\n### At 5 s\n")
    assert "### At 60 s" in text and "### At 120 s" not in text and text.endswith(" |\n")
    level, difference = rows(text.split("### At 60 s")[1], "sparse")
    assert list(level) == [
        *("policy", "videos", *TITLES.values(), "attention density", "ms per block", "KV MB"),
    ]
    assert level["videos"] == "24" and difference["prompts"] == "12"
    assert level["attention density"] == "0.491" and level["ms per block"] == "61" and level["KV MB"] == "-"
    assert rows(text, "dense")[0]["ms per block"] == "1,234"
    mean, low, high = (float(part.strip("[],* ")) for part in difference["background PSNR"].split())
    assert low < mean < high and mean == pytest.approx(11.0, abs=0.5), "11 windows later, a decibel each"
    assert difference["background PSNR"].startswith("**+") and difference["shape"] == "+0.00 [+0.00, +0.00]"
    assert [len(rows(text, label)) for label in ("dense", "sparse", "short")] == [3, 6, 4]


def test_motion_is_shown_as_a_share_of_the_first_seconds_and_its_difference_as_it_is():
    text = tables(moments=(5, 60))
    first, last = rows(text, "dense")
    assert first["motion kept"] == "1.00 [1.00, 1.00]" and last["motion kept"] == "0.45 [0.45, 0.45]"
    assert first["background PSNR"] == "-", "no window before it to compare with"
    difference = rows(text, "sparse")[3]
    # Motion is 1 to 12, so the mean difference is 0.55 x 6.5.
    assert difference["motion magnitude"].startswith("**+3.58 [") and "motion kept" not in difference


def test_bold_needs_the_sign_test_too():
    """The interval leaves out zero; so few signs cannot say so."""
    few = [replace(run, videos=run.videos[:10]) for run in (DENSE, SPARSE)]
    text = tables(few, moments=(60,))
    difference = rows(text, "sparse")[1]["background PSNR"]
    low = float(difference.partition("[")[2].partition(",")[0])
    assert low > 0 and not difference.startswith("**"), "5 prompts cannot reach a p of 0.05"


def test_references_stand_above_and_have_the_mean_of_six():
    true = rows(tables(moments=(30,), levels=LEVELS), "_true scene_")[0]
    assert true["judge, mean of six"] == "0.85" and true["camera"] == "0.60"
    assert true["motion kept"] == true["one object"] == true["KV MB"] == true["videos"] == ""


def test_any_measure_with_a_curve_can_be_a_column():
    assert choose_columns(RUNS, ["proxy/flow", "judge/shape"]) == ["proxy/flow[flow=x]", "judge/shape"]
    text = tables(moments=(30,), columns=["proxy/flow[flow=x]"])
    assert rows(text, "short")[0]["Flow"] == "1.00 [1.00, 1.00]"
    with pytest.raises(ValueError, match="no run has a metric 'proxy/shape'; near it: judge/shape"):
        choose_columns(RUNS, ["proxy/shape"])
    with pytest.raises(ValueError, match="no video lasts until 90 s"):
        tables(moments=(90,))
    other = MetricSpec(name="proxy/x", higher_is_better=None)
    with pytest.raises(ValueError, match="name some with --metrics"):
        choose_columns([replace(DENSE, specs={"proxy/x": other})], None)


def test_curves_are_drawn_of_what_has_them(tmp_path):
    without = [replace(video, scores=video.scores | {"judge/shape": Score.none("why")}) for video in DENSE.videos]
    run = replace(DENSE, videos=without)
    write_curves([run], tmp_path / "a.png", baseline="dense", columns=["judge/shape", "judge/camera"])
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="none of judge/shape has a curve"):
        write_curves([run], tmp_path / "b.png", baseline="dense", columns=["judge/shape"])


BEGIN, END = "<!-- study: written by longtake evaluate table -->", "<!-- end of study -->"


def test_only_a_section_of_a_page_changes(tmp_path):
    page, text = tmp_path / "page.md", f"# Title\n\n{BEGIN}\nold\n{END}\nafter\n"
    page.write_text(text)
    for new in (None, "new\n", "new\n"):
        replace_section(page, "study", new)
        assert page.read_text() == text.replace("old\n", new or "old\n")
    for bad in ("nothing", BEGIN, f"{END}\n{BEGIN}", text + text):
        page.write_text(bad)
        with pytest.raises(ValueError, match=r"page.md has no section 'study': add the lines"):
            replace_section(page, "study", "")


def test_the_command_takes_several_folders_and_writes_a_page(tmp_path, capfd, monkeypatch):
    for folder, runs in (("first", (SPARSE, DENSE)), ("second", (SHORT,))):
        for run in runs:
            place = tmp_path / folder / run.label
            specs = [asdict(spec) for spec in run.specs.values()]
            write_json(place / "run.json", run_record(run.label, {}, specs, {}))
            write_json(place / "costs.json", dict(run.costs))
            for video in run.videos:
                write_json(place / "scores" / f"{video.video.id}.json", video.to_json())
    protocol = "caches: [dense, sparse]\nbaseline: dense\nmoments: [5, 30]\n"
    (tmp_path / "first" / "protocol.yaml").write_text(protocol)
    asked = []

    def measured(folder, prompts, prompt_seed):
        asked.append((folder, prompts))
        return {name: {"shape": row["judge/shape"]} for name, row in LEVELS.items()}

    monkeypatch.setattr(judge, "reference_levels", measured)

    def call(*words):
        code = run_app(app, ["evaluate", "table", *map(str, words)])
        return code, *capfd.readouterr()

    first = tmp_path / "first"
    assert call(first, "--no-reference") == (0, tables((DENSE, SPARSE), moments=(5, 30)), "")
    assert not asked
    code, _, stderr = call(first, "--no-reference", "--curves", tmp_path / "new" / "curves.png")
    assert code == 0 and stderr == f"wrote {tmp_path / 'new' / 'curves.png'}\n"
    with Image.open(tmp_path / "new" / "curves.png") as picture:
        assert picture.height > picture.width / 2, "four rows of panels: eleven measures"
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{BEGIN}\n{END}\n")
    into = ("--page", page, "--section", "study")
    code, _, stderr = call(first, tmp_path / "second", "--moments", "60", "--metrics", "judge/shape", *into)
    assert code == 0 and stderr == f"wrote 'study' of {page}\n"
    levels = {"true scene": {"judge/shape": 0.9}}
    expected = tables(moments=(60,), columns=["judge/shape"], levels=levels)
    assert page.read_text() == f"# Title\n{BEGIN}\n{expected}{END}\n"
    assert asked == [(first, list(range(NUM_PROMPTS)))]
    for words, message in (
        ((first, "--baseline", "pack"), "baseline 'pack' is none of the runs: dense, sparse"),
        ((first, "--moments", "x"), "'x' is no number of seconds"),
        ((first, "--page", page), "--page and --section go together"),
        ((first, "--page", page, "--section", "other"), "has no section 'other'"),
        ((tmp_path / "none",), "holds no run of an evaluation"),
    ):
        code, _, stderr = call(*words)
        assert code == 2 and message in stderr and len(stderr.splitlines()) == 1
