#!/bin/sh
# A video that is written while it is made is often a fragmented MP4 (ffmpeg's movflags frag_keyframe): it plays after a crash.
# Every frame decodes in order, but readers that ask the header for a count get the samples before the first fragment. OpenCV
# says 2 frames of 100, and setting CAP_PROP_POS_FRAMES to 50 succeeds and returns frame 1 (brightness 3 instead of 100): an
# evaluation that samples frames by index sees the first moments of the video only, without an error. imageio's pyav plugin
# says 2 frames too, and stops with an IndexError while reading. With empty_moov added OpenCV is right (100, frame 50), while
# imageio's improps and PyAV's stream.frames say 0 frames, though imread returns all.
# Seen with PyAV 18.1.0, imageio 2.38.1, opencv-python-headless 5.0.0.93. A good guess would be: a file that plays has a count.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check av==18.1.0 imageio==2.38.1 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > check.py <<'PY'
from fractions import Fraction

import av
import cv2
import imageio
import imageio.v3 as iio
import numpy as np

NUM_FRAMES = 100


def write(path, movflags):
    """Frame i is grey of brightness 2 i."""
    with av.open(path, "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("libx264", rate=16, options={"bf": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 12
        for index in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 2 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def seen(path):
    with av.open(path) as container:
        header, decoded = container.streams.video[0].frames, sum(1 for _ in container.decode(video=0))
    capture = cv2.VideoCapture(path)
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    is_set = capture.set(cv2.CAP_PROP_POS_FRAMES, 50)
    _, picture = capture.read()
    try:
        read = len(iio.imread(path, plugin="pyav"))
    except IndexError:
        read = "IndexError"
    counted = iio.improps(path, plugin="pyav").shape[0]
    return [decoded, header, counted, read, count, is_set, round(float(picture.mean()))]


print("PyAV", av.__version__, "imageio", imageio.__version__, "OpenCV", cv2.__version__)
print("frames decoded, in PyAV's header, by imageio's improps, by imread, by OpenCV;")
print("OpenCV set to frame 50, of brightness 100: accepted, brightness of what it returned")
rows = {}
for name, movflags in {"one moov": "", "frag_keyframe": "frag_keyframe", "and empty_moov": "frag_keyframe+empty_moov"}.items():
    write("video.mp4", movflags)
    rows[name] = seen("video.mp4")
    print(f"{name:15}", *rows[name])
assert rows["one moov"] == [100, 100, 100, 100, 100, True, 100]
assert rows["frag_keyframe"][:5] == [100, 2, 2, "IndexError", 2] and rows["frag_keyframe"][5:] != [True, 100], "changed"
assert rows["and empty_moov"] == [100, 0, 0, 100, 100, True, 100], "the behaviour has changed"
PY
venv/bin/python check.py
