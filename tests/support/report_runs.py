"""Made-up runs for the report's tests: policies with gains, drifts and faults, and tiny videos for filmstrips."""

from functools import cache

import numpy as np

from longtake.evaluation.comparison import compare_runs
from longtake.evaluation.metric import MetricSpec, Score, Window
from longtake.evaluation.records import ManifestLine, RunScores, VideoScores

POLICIES = (
    *("full", "sliding_window", "deep_forcing", "pack", "attention_sink", "ema_sink", "infinity_rope", "memrope"),
    *("longlive", "rolling_forcing", "rolling_sink", "slow_fast", "forcing_kv", "relax", "tempcache"),
    "pack_8_sinks_int4_offloaded",
)
NASTY = "a <script>document.title='owned'</script> & \"quoted\" red circle \u202e\x07 =1+1"
FPS, WINDOW = 16.0, 32
FROZEN = "relax"
WITHOUT_OVERALL = "pack"

# name: (level, how much policies differ, loss per minute, noise of a video, higher is better, unit, range)
MEASURES = {
    "vbench/temporal_flickering": (0.972, 0.004, 0.002, 0.006, True, "0..1", (0.0, 1.0)),
    "vbench_form/long/subject_consistency[enc=hog+hist]": (0.941, 0.012, 0.02, 0.012, True, "0..1", (0.0, 1.0)),
    "vbench_form/subject_consistency[enc=hog+hist]": (0.902, 0.02, 0.05, 0.02, True, "0..1", (0.0, 1.0)),
    "vbench_form/long/background_consistency[enc=hog+hist]": (0.952, 0.008, 0.015, 0.01, True, "0..1", (0.0, 1.0)),
    "vbench_form/long/motion_smoothness[interp=linear_blend]": (0.981, 0.003, 0.001, 0.004, True, "0..1", (0.0, 1.0)),
    "vbench_form/long/dynamic_degree[flow=torch_lk]": (0.55, 0.1, 0.1, 0.2, True, "0..1", (0.0, 1.0)),
    "judge/mean_of_six": (0.83, 0.08, 0.18, 0.05, True, "share", (0.0, 1.0)),
    "judge/background_psnr": (31.4, 3.0, 9.0, 2.0, True, "dB", (0.0, None)),
    "proxy/flow_magnitude_mean": (1.8, 0.4, 0.3, 0.5, None, "px per 1/8 s", (0.0, None)),
    "proxy/nss_drift_self": (2.1, 0.6, -3.0, 0.4, False, "", (0.0, None)),
    "proxy/chunk_seam_ratio": (1.08, 0.1, -0.05, 0.04, False, "ratio", (0.0, None)),
    "proxy/contrast": (41.0, 4.0, 6.0, 3.0, None, "grey levels", (0.0, 255.0)),
}
SKIPPED = {
    "vbench/aesthetic_quality": "no backbone for aesthetic_head: give CLIP ViT-L/14 and LAION's head with --backbones",
    "vbench/imaging_quality": "no backbone for musiq: give MUSIQ-SPAQ with --backbones",
    "vbench/object_class": "left to the official tool: needs detectron2; see export-vbench",
    "vbench/scene": "left to the official tool: needs Tag2Text; see export-vbench",
}


def build_runs(num_policies=4, *, num_prompts=12, num_seeds=2, num_windows=30, num_extra=0, overall=True, prompt=None):
    """Runs of some of POLICIES; ``num_extra`` further measures ``proxy/extra_N`` make the comparison large."""
    specs = {
        name: MetricSpec(name=name, higher_is_better=better, unit=unit, range=bounds, description=f"Made up: {name}.")
        for name, (_, _, _, _, better, unit, bounds) in MEASURES.items()
    }
    for index in range(num_extra):
        specs[f"proxy/extra_{index}"] = MetricSpec(name=f"proxy/extra_{index}", higher_is_better=index % 2 == 0)
    if overall:
        name = "vbench/overall_consistency"
        specs[name] = MetricSpec(name=name, higher_is_better=True, range=(0.0, 1.0))
    return [
        _run(label, number, specs, num_prompts, num_seeds, num_windows, prompt)
        for number, label in enumerate(POLICIES[:num_policies])
    ]


def _run(label, number, specs, num_prompts, num_seeds, num_windows, prompt):
    videos = []
    for p in range(num_prompts):
        for s in range(num_seeds):
            rng = np.random.default_rng([number, p, s])
            scores = {name: _score(name, label, number, (p, s), rng, num_windows) for name in specs}
            if label == FROZEN and p % 3 == 0:
                details = {"seconds": num_windows * 2.0, "longest_rest_before_s": 0.0}
                scores["proxy/static_share"] = Score(value=1.0, details=details)
            line = ManifestLine(
                id=f"p{p:04d}-{s}",
                file=f"videos/p{p:04d}-{s}.mp4",
                prompt=prompt
                if prompt and p == 0
                else f"a red circle bouncing slowly over a navy striped background {p}",
                prompt_index=p,
                seed_index=s,
                seed=1000 * p + s,
                policy=label,
                num_frames=num_windows * WINDOW,
                fps=FPS,
                height=64,
                width=64,
            )
            videos.append(VideoScores(video=line, scores=scores))
    header = {"fingerprint": "0123456789abcdef"}
    costs = {"ms_per_block": 310.0 + 41.0 * number, "kv_mb": 96.0 / (1 + number), "first_frame_s": 0.4 + 0.03 * number}
    return RunScores(label=label, specs=specs, videos=videos, header=header, skipped=SKIPPED, costs=costs)


@cache
def _shared(name, prompt_index, seed_index):
    """Effect of a prompt and seed on a measure under every policy."""
    return np.random.default_rng([sum(map(ord, name)), prompt_index, seed_index]).normal()


def _score(name, label, number, pair, rng, num_windows):
    if name == "vbench/overall_consistency":
        if label == WITHOUT_OVERALL:
            return Score.none("the text encoder gave no finite number")
        return Score(value=float(np.clip(0.2 + 0.01 * rng.normal(), 0, 1)))
    level, gain, loss, noise, _, _, bounds = MEASURES.get(name, (0.5, 0.05, 0.02, 0.05, True, "", (None, None)))
    shift = gain * np.sin(2.3 * number + len(name))
    base = level + shift + noise * (0.8 * _shared(name, *pair) + 0.35 * rng.normal())
    time = np.arange(num_windows) * WINDOW / FPS / 60.0
    slope = loss * (1.0 + 0.9 * np.cos(1.7 * number))
    curve = base - slope * time**0.8 + 0.25 * noise * rng.normal(size=num_windows)
    low, high = (np.inf if bound is None else bound for bound in bounds)
    curve = np.clip(curve, low if np.isfinite(low) else -np.inf, high)
    if name.endswith("motion_smoothness[interp=linear_blend]"):
        curve[-2:] = np.nan
    windows = tuple(
        Window(start_frame=i * WINDOW, num_frames=WINDOW, value=None if np.isnan(v) else float(v))
        for i, v in enumerate(curve)
    )
    if np.isnan(curve).all():
        return Score.none("too short")
    return Score(value=float(np.nanmean(curve)), windows=() if name == "proxy/chunk_seam_ratio" else windows)


def compare(runs, **options):
    """The comparison of runs with the first as the baseline, with few resamples."""
    return compare_runs(runs, baseline=runs[0].label, **{"num_resamples": 400, "moments": (5.0, 30.0, 60.0)} | options)


def write_videos(folder, runs, *, num_prompts=3, num_frames=40, size=64):
    """Tiny videos of the first prompts: a dot that moves; {label: folder}."""
    import imageio.v3 as iio

    rows, columns = np.mgrid[:size, :size]
    for number, run in enumerate(runs):
        for video in run.videos:
            line = video.video
            if line.prompt_index >= num_prompts or line.seed_index:
                continue
            path = folder / run.label / line.file
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = np.zeros((num_frames, size, size, 3), np.uint8)
            frames[..., 2] = 90
            for index, frame in enumerate(frames):
                x = size / 2 + (0.0 if run.label == FROZEN else 0.35 * size * np.sin(index / 6 + number))
                frame[(rows - size / 2) ** 2 + (columns - x) ** 2 < (size / 6) ** 2] = (
                    200,
                    40 + 40 * line.prompt_index,
                    40,
                )
                frame[..., 1] = np.clip(frame[..., 1] + index * (number % 3), 0, 255)
            iio.imwrite(path, frames, fps=FPS, codec="libx264", output_params=["-crf", "18"], macro_block_size=2)
    return {run.label: folder / run.label for run in runs}
