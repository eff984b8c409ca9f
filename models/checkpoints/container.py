"""What kind of file it is, by its first bytes; suffixes lie."""

import json
import zipfile
from pathlib import Path
from typing import Literal

MAX_HEADER_BYTES = 100_000_000
_LOOK = 512
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<!doctype html": "a web page, so the download went wrong: download it again",
    b"<html": "a web page, so the download went wrong: download it again",
}


def detect_container(path: Path) -> Literal["safetensors", "pickle"]:
    """Tell a safetensors file from a zipped pickle.

    Args:
        path: A file.

    Returns:
        ``safetensors`` or ``pickle`` (what ``torch.save`` writes since PyTorch 1.6).

    Raises:
        ValueError: If it is neither; says what it is and what to do.
    """
    with path.open("rb") as file:
        start = file.read(_LOOK)
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "pickle"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    raise ValueError(f"'{path}' {_describe(start)}.")


def _describe(start: bytes) -> str:
    """What a file that is no checkpoint is, and the remedy."""
    if not start:
        return "is empty: download it again"
    for sign, text in _TEXTS.items():
        if start.lower().startswith(sign):
            return f"is {text}"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, whose weights are quantised: give the safetensors or .pt file it was made from"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return (
            "is a legacy pickle (not zipped), which cannot be read tensor by tensor: load it with "
            "torch.load(..., weights_only=True) and save it again with torch.save"
        )
    if _is_text(start):
        return "is a text file, no checkpoint: give a .safetensors or .pt file"
    return (
        "is neither a safetensors file nor a zipped pickle (torch.save): its beginning is damaged or of another kind"
    )


def _is_text(start: bytes) -> bool:
    # The last character may be cut in the middle.
    text = start.decode("utf-8", errors="replace")[:-1]
    return "\ufffd" not in text and all(letter.isprintable() or letter.isspace() for letter in text)


def _check_zip(path: Path) -> None:
    """Refuse a zip archive that is cut off, packed, or holds no checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"'{path}' is truncated: a zipped pickle whose end is missing ({path.stat().st_size} bytes are there); "
            "download it again."
        ) from error
    if any("/code/" in member.filename or member.filename.endswith("/constants.pkl") for member in members):
        raise ValueError(f"'{path}' is a TorchScript archive, which holds code: give the plain state dict.")
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise ValueError(
            f"'{path}' is a zip archive without data.pkl, so torch.save did not write it: unpack it first."
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(f"'{path}' is a packed zip archive, as torch.save never writes: unpack it first.")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: If there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read '{path}': {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds no JSON object but a {type(found).__name__}.")
    return found
