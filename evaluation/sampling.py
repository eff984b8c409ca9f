"""Which frames a metric looks at: VBench's rules for clips and samples, and stretches of a long video."""

import numpy as np


def clip_ranges(num_frames: int, fps: float, seconds: float = 2) -> list[tuple[int, int]]:
    """Cut a video into clips as VBench-Long does.

    A clip has ``int(fps) * seconds`` frames. What is left at the end becomes a clip of the same length that starts
    in the clip before; a video shorter than one clip is one clip.

    Args:
        num_frames: Of the video, at least 1.
        fps: Frames per second, at least 1; its fraction is dropped.
        seconds: Length of a clip, a whole number.

    Returns:
        (first frame, number of frames) of each clip, in order.

    Raises:
        ValueError: If a clip would have no frame, or seconds is not a whole number.

    Source: VBench-Long, ``split_video_into_clips`` (commit 45e79ec).
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a video has at least one frame")
    if seconds != int(seconds) or seconds < 1:
        raise ValueError(f"seconds={seconds}: VBench-Long's clips last whole seconds: use 1 or more")
    length = int(fps) * int(seconds)
    if length < 1:
        raise ValueError(f"fps={fps} gives clips without frames: use a video of at least 1 frame per second")
    if num_frames < length:
        return [(0, num_frames)]
    clips = [(start, length) for start in range(0, num_frames - length + 1, length)]
    if num_frames % length:
        clips.append((num_frames - length, length))
    return clips


def middle(num_samples: int, num_frames: int) -> list[int]:
    """The middle frames of so many equal stretches; the last is repeated where the video has fewer frames.

    Args:
        num_samples: Frames wanted, at least 1.
        num_frames: Of the video, at least 1.

    Returns:
        ``num_samples`` frame indices in ascending order.

    Raises:
        ValueError: If either is below 1.

    Source: VBench, ``get_frame_indices(sample="middle")``.
    """
    if num_samples < 1 or num_frames < 1:
        raise ValueError(f"num_samples={num_samples} of num_frames={num_frames}: both are at least 1")
    edges = np.linspace(0, num_frames, min(num_samples, num_frames) + 1).astype(int)
    indices = [int(start + end - 1) // 2 for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return indices + indices[-1:] * (num_samples - len(indices))


def stride_for_8fps(fps: float) -> int:
    """Every how many frames to look for about eight frames a second, as VBench's dynamic degree does.

    Rounds a half to the even neighbour, as VBench does: 20 frames per second give 2, not 3.

    Raises:
        ValueError: If fps is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps}: frames per second are above 0")
    return max(1, round(fps / 8))


def first_last(num_frames: int, fps: float, seconds: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last so many seconds, as (first frame, number of frames).

    Raises:
        ValueError: If the two would overlap.
    """
    length = max(1, round(seconds * fps))
    if 2 * length > num_frames:
        raise ValueError(
            f"a video of {num_frames / fps:g} s has no first and last {seconds:g} s apart: "
            f"use at least {2 * seconds:g} s of video, or fewer seconds"
        )
    return (0, length), (num_frames - length, length)


def percent(num_frames: int, share: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last so many percent of a video, at least a frame each, as (first frame, number of frames).

    Args:
        num_frames: Of the video.
        share: In percent, above 0, at most 50.

    Raises:
        ValueError: If the share is outside that, or the video has fewer than two frames.
    """
    if not 0 < share <= 50:
        raise ValueError(f"share={share} %: use more than 0 and at most 50, or the two ends overlap")
    if num_frames < 2:
        raise ValueError(f"num_frames={num_frames}: two ends need at least 2 frames")
    length = max(1, int(num_frames * share / 100))
    return (0, length), (num_frames - length, length)


def equal_parts(num_frames: int, num_parts: int) -> list[tuple[int, int]]:
    """Cut a video into parts whose lengths differ by a frame at most, as (first frame, number of frames).

    Raises:
        ValueError: If there are fewer frames than parts.
    """
    if not 1 <= num_parts <= num_frames:
        raise ValueError(f"num_parts={num_parts} of num_frames={num_frames}: use 1 to num_frames parts")
    edges = [num_frames * part // num_parts for part in range(num_parts + 1)]
    return [(start, end - start) for start, end in zip(edges[:-1], edges[1:], strict=True)]
