#!/bin/sh
# imageio's pyav plugin allocates as many frames as the MP4 header counts and fills those that the decoder yields. A clip
# cut without re-encoding (`ffmpeg -ss 0.75 -c copy`) keeps hidden frames before its start, marked by an edit list: they
# are counted, not yielded. imread then returns an array whose last frames are uninitialised memory, without a warning.
# imiter of the same plugin, PyAV itself and imageio's FFMPEG plugin return the visible frames only.
# Seen with imageio 2.38.1, av 18.1.0, imageio-ffmpeg 0.8.1, numpy 2.4.6: imread 36 frames, imiter 30.
# A good guess would be: imread equals the stacked frames of imiter. Metrics over whole clips are wrong otherwise.
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

with av.open("whole.mp4", "w") as file:  # two seconds, a key frame every half second
    stream = file.add_stream("libx264", rate=24, options={"g": "12"})
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
    for index in range(48):
        picture = np.full((32, 64, 3), 5 * index, np.uint8)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    file.mux(stream.encode())
ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
subprocess.run([ffmpeg, "-loglevel", "error", "-ss", "0.75", "-i", "whole.mp4", "-c", "copy", "cut.mp4"], check=True)

array = iio.imread("cut.mp4", plugin="pyav")
frames = list(iio.imiter("cut.mp4", plugin="pyav"))
other = iio.imread("cut.mp4", plugin="FFMPEG")
with av.open("cut.mp4") as file:
    decoded = sum(1 for _ in file.decode(video=0))
print("imageio", imageio.__version__, "av", av.__version__)
print("imread:", len(array), "imiter:", len(frames), "FFMPEG plugin:", len(other), "PyAV:", decoded)
print("mean of the last ten frames of imread:", [round(float(frame.mean())) for frame in array[-10:]])
assert (len(array), len(frames), len(other), decoded) == (36, 30, 30, 30), "the behaviour has changed"
assert np.array_equal(array[:30], np.stack(frames))
PY
venv/bin/python check.py
