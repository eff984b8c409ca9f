#!/bin/sh
# A display matrix in an MP4 (phones write one for upright videos) is applied by the ffmpeg program, by players and by imageio's
# FFMPEG plugin. imageio's pyav plugin returns the stored picture, so the same call on the same file gives height and width
# exchanged, and content turned, depending on which plugin is installed; no warning, and the plugin's metadata has no rotation.
# Seen with imageio 2.38.1, av 18.1.0 (frame.rotation tells the angle), imageio-ffmpeg 0.8.1.
# A good guess would be: both plugins of one library return one picture.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check imageio==2.38.1 av==18.1.0 imageio-ffmpeg==0.8.1 numpy==2.4.6
cat > check.py <<'PY'
import subprocess
import av
import imageio
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np

picture = np.zeros((32, 64, 3), np.uint8)
picture[:, :32] = 255  # left half white
iio.imwrite("stored.mp4", np.stack([picture] * 8), plugin="pyav", codec="libx264", fps=24)
ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
turn = ["-display_rotation", "90", "-i", "stored.mp4", "-c", "copy", "turned.mp4"]
subprocess.run([ffmpeg, "-loglevel", "error", *turn], check=True)

stored = iio.imread("turned.mp4", plugin="pyav")
shown = iio.imread("turned.mp4", plugin="FFMPEG")
with av.open("turned.mp4") as file:
    angle = next(file.decode(video=0)).rotation
metadata = iio.immeta("turned.mp4", plugin="pyav")
print("imageio", imageio.__version__, "av", av.__version__)
print("pyav:", stored.shape, "FFMPEG:", shown.shape, "frame.rotation:", angle)
assert stored.shape == (8, 32, 64, 3) and shown.shape == (8, 64, 32, 3), "the behaviour has changed"
assert abs(angle) == 90 and not any("rotat" in key for key in metadata)
PY
venv/bin/python check.py
