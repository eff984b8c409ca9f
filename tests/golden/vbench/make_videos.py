"""Deterministic synthetic videos for metric tests (numpy only to build; imageio-ffmpeg to encode).

videos/<name>.mp4 is H.264 RGB 4:4:4 with -crf 0, i.e. lossless: cv2 and decord were both
checked to return exactly the frames built here (run_official.py stores sha256 of the RGB bytes
in golden.json, so a test may either decode the mp4 or rebuild the arrays with build(name)).
"""

import os
import subprocess

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


def texture(h, w, seed=0):
    """Smooth, textured background from a few cosines: no random generator needed."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    out = np.zeros((h, w, 3))
    for c in range(3):
        s = np.zeros((h, w))
        for k in range(1, 5):
            s += np.cos(2 * np.pi * (k * x / w * (1 + c) + (5 - k) * y / h) + seed + 1.7 * k * (c + 1)) / k
        out[..., c] = 110 + 35 * s
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def put(frame, y, x, s, color):
    h, w, _ = frame.shape
    y, x = int(y) % (h - s), int(x) % (w - s)
    frame[y : y + s, x : x + s] = color


def static(T=64, h=96, w=160):
    return np.repeat(texture(h, w)[None], T, 0)


def moving_squares(T=64, h=96, w=160, vy=(1, -2, 0), vx=(2, 1, 3)):
    bg = texture(h, w, 1)
    cols = [(250, 30, 30), (30, 250, 60), (40, 60, 250)]
    out = []
    for t in range(T):
        f = bg.copy()
        for i in range(3):
            put(f, 10 + 25 * i + vy[i] * t, 15 + 40 * i + vx[i] * t, 18, cols[i])
        out.append(f)
    return np.stack(out)


def flicker(T=64, h=64, w=96):
    bg = texture(h, w, 2).astype(np.int64)
    gain = [((t * 7) % 5 - 2) * 12 for t in range(T)]
    return np.stack([np.clip(bg + g, 0, 255).astype(np.uint8) for g in gain])


def noise(T=64, h=48, w=64):
    return np.random.Generator(np.random.PCG64(1234)).integers(0, 256, (T, h, w, 3), dtype=np.uint8)


def drift(T=160, h=48, w=80):
    """10 s at 16 fps: one square moves; exposure rises, saturation rises, contrast falls with time."""
    base = moving_squares(T, h + 48, w + 80, vy=(1, 0, 0), vx=(1, 1, 1))[:, 24 : 24 + h, 40 : 40 + w].astype(
        np.float64
    )
    out = []
    for t in range(T):
        a = t / (T - 1)
        f = base[t]
        grey = f.mean(-1, keepdims=True)
        f = grey + (f - grey) * (1 + 0.8 * a)
        f = (f - 128) * (1 - 0.5 * a) + 128 + 60 * a
        out.append(np.clip(np.rint(f), 0, 255).astype(np.uint8))
    return np.stack(out)


def big(T=8, h=360, w=640):
    bg = texture(h, w, 3)
    out = []
    for t in range(T):
        f = bg.copy()
        put(f, 60 + 16 * t, 80 + 24 * t, 96, (245, 220, 40))
        out.append(f)
    return np.stack(out)


SPECS = {  # name: (function, kwargs, fps)
    "static": (static, {}, 16),
    "moving_squares": (moving_squares, {}, 16),
    "slow_squares_8": (moving_squares, dict(T=32, vy=(0, 1, 0), vx=(1, 0, 1)), 8),
    "flicker": (flicker, {}, 16),
    "noise": (noise, {}, 16),
    "drift": (drift, {}, 16),
    "odd_len": (moving_squares, dict(T=70, h=75, w=91), 16),
    "short20": (moving_squares, dict(T=20, h=64, w=96), 16),
    "big": (big, {}, 30),
}


def encode(path, frames, fps):
    import imageio_ffmpeg

    size = f"{frames.shape[2]}x{frames.shape[1]}"
    read = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    write = [
        "-c:v",
        "libx264rgb",
        "-crf",
        "0",
        "-preset",
        "veryslow",
        "-threads",
        "1",
        "-movflags",
        "+faststart",
        path,
    ]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *read, *write, path]
    subprocess.run(command, input=frames.tobytes(), check=True)


def build(name):
    fn, kw, fps = SPECS[name]
    return fn(**kw), fps


if __name__ == "__main__":
    os.makedirs(f"{HERE}/videos", exist_ok=True)
    for name in SPECS:
        fr, fps = build(name)
        encode(f"{HERE}/videos/{name}.mp4", fr, fps)
        print(name, fr.shape, fps)
