"""The script that runs the official VBench on an export, and how to set its packages up."""

from collections.abc import Sequence

from longtake.evaluation.vbench_io.layout import COMMIT, FOLDERS, folder_of

_HEAD = """\
#!/usr/bin/env bash
# Scores the videos beside this file with the official VBench. Needs a CUDA GPU and the environment of README.md.
# Every dimension gets a process and a folder of results of its own: decord's settings leak from one to the next.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
commit={commit}
mode={mode}
dev_flag={dev_flag}  # of VBench-Long: false = in-clip consistency alone, true = half of it clip to clip
: "${{VBENCH_HOME:?set VBENCH_HOME to a checkout of github.com/Vchitect/VBench at commit $commit}}"
# The official tool pastes paths into shell commands.
case "$here" in
  *[!A-Za-z0-9._/-]*) echo "move this folder to a path of letters, digits, '.', '_', '-' and '/': $here" >&2; exit 2 ;;
esac
if [ -e "$here/results" ] || [ -e "$here/videos/split_clip" ]; then
  echo "this export was scored before, and VBench would use its old clips again: export to a new folder" >&2
  exit 2
fi
at="$(git -C "$VBENCH_HOME" rev-parse HEAD 2>/dev/null || echo unknown)"
if [ "$at" != "$commit" ]; then echo "note: VBench is at $at, this script was written for $commit" >&2; fi
cd "$VBENCH_HOME"
"""
_RECORD = """\
  printf '{"mode": "%s", "dev_flag": %s, "commit": "%s"}\\n' "$mode" "$dev_flag" "$at" > "$results/run_info.json"
done
echo "done: import with 'longtake evaluate import-vbench $here/results/*/*_eval_results.json'"
"""
_CUSTOM = """\
for dimension in {dimensions}; do
  results="$here/results/$dimension"
  mkdir -p "$results"
  python evaluate.py --videos_path "$here/videos" --output_path "$results" --dimension "$dimension" \\
    --mode=custom_input --prompt_file "$here/prompt_file.json"
"""
_LONG = """\
flags=()
if [ "$dev_flag" = true ]; then flags+=(--dev_flag); fi
for dimension in {dimensions}; do
  results="$here/results/$dimension"
  mkdir -p "$results"
  python vbench2_beta_long/eval_long.py --videos_path "$here/videos" --output_path "$results" \\
    --dimension "$dimension" --mode long_custom_input ${{flags[@]+"${{flags[@]}}"}}
"""
_STANDARD = """\
for pair in {pairs}; do  # dimension:folder
  dimension="${{pair%%:*}}"
  results="$here/results/$dimension"
  mkdir -p "$results"
  python evaluate.py --videos_path "$here/videos/${{pair##*:}}" --output_path "$results" --dimension "$dimension" \\
    --full_json_dir "$here/VBench_full_info.json" --mode=vbench_standard
"""


def run_script(mode: str, dimensions: Sequence[str], *, dev_flag: bool | None) -> str:
    """A bash script that scores an export, dimension by dimension.

    Args:
        mode: The official tool's ``--mode``.
        dimensions: To score.
        dev_flag: VBench-Long's; None where there is none.

    Returns:
        Its text; results go to ``results/DIMENSION/``, with a ``run_info.json`` that says how they were made.
    """
    head = _HEAD.format(commit=COMMIT, mode=mode, dev_flag={None: "null", True: "true", False: "false"}[dev_flag])
    if mode == "vbench_standard":
        body = _STANDARD.format(pairs=" ".join(f"{name}:{folder_of(name)}" for name in dimensions))
    else:
        body = (_LONG if mode == "long_custom_input" else _CUSTOM).format(dimensions=" ".join(dimensions))
    return head + body + _RECORD


ENVIRONMENT = f"""\
git clone https://github.com/Vchitect/VBench.git && cd VBench && git checkout {COMMIT[:7]}
python3.10 -m venv .venv && . .venv/bin/activate
pip install torch==2.3.1 torchvision==0.18.1 --index-url https://download.pytorch.org/whl/cu121
pip install 'setuptools<81' wheel 'numpy<2' 'moviepy<2' 'opencv-python<4.12'
pip install 'transformers==4.33.2' 'timm<=1.0.12' 'pyiqa==0.1.10' openai-clip decord fairscale lvis pycocoevalcap
pip install 'scenedetect[opencv]' dreamsim 'av<13'        # VBench-Long only
pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'   # object, color, relation
export VBENCH_HOME=$PWD                                    # weights: ~/.cache/vbench, or VBENCH_CACHE_DIR
"""
"""Commands that set up the official tool in an environment of its own."""

_README = """\
# Videos for the official VBench

Mode `{mode}`, dimensions {dimensions}.

```
{environment}./run.sh
longtake evaluate import-vbench results/*/*_eval_results.json
```

The environment was put together from the tool's requirements and issue threads; it has not been run by us. Why these
versions:

- `openai-clip` and ViCLIP's text file import `pkg_resources`, which is gone from setuptools 81 on; an unpinned
  install takes a newer one.
- VBench-Long uses `torchvision.io.write_video` (with PyAV), which the newest torchvision no longer has, and imports
  `moviepy.editor`, which is gone in moviepy 2. torchvision's default of antialiasing, which its clip-to-clip branch
  depends on, is that of 0.17 and later here.
- `torch.load` of AMT's weights needs torch before 2.6, or a checkout that passes `weights_only=False`.
- The package on PyPI (0.1.5) has neither VBench-Long's `configs/` nor `scripts/`: use a checkout.
- detectron2 goes in after torch and before anything that pulls another torch; only `object_class`,
  `multiple_objects`, `color` and `spatial_relationship` need it.

What to know:

- It needs a CUDA GPU, also for dimensions that would not (`nccl`, `torch.cuda.set_device`).
- VBench-Long cuts clips with a lossy codec and keeps them in `videos/`: export anew to score anew. Its score is a
  mean over clips; the consistencies change with `--dev_flag`, which the imported names tell apart.
- An underscore in a file name would switch VBench-Long's clip-to-clip term off without a word: these names have none.
- `temporal_flickering` is meant for static scenes: on free prompts it mostly measures motion.
{notes}"""


def readme(mode: str, dimensions: Sequence[str], notes: Sequence[str]) -> str:
    """The README of an export: how to set the tool up, how to run it, what to know about its numbers.

    Args:
        mode: The official tool's ``--mode``.
        dimensions: To score.
        notes: On these videos.
    """
    lines = [f"- {note[0].upper()}{note[1:]}.\n" for note in notes]
    if mode == "vbench_standard" and any(name in FOLDERS for name in dimensions):
        lines.append("- Some dimensions are scored on other dimensions' videos, as VBench has it; see `run.sh`.\n")
    return _README.format(
        mode=mode,
        dimensions=", ".join(f"`{name}`" for name in dimensions),
        environment=ENVIRONMENT,
        notes="".join(lines),
    )
