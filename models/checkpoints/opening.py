"""From a path to an opened checkpoint."""

from pathlib import Path

from longtake.models.checkpoints.checkpoint import Checkpoint
from longtake.models.checkpoints.container import detect_container
from longtake.models.checkpoints.pickle_file import PickleCheckpoint
from longtake.models.checkpoints.safetensors_file import SafetensorsCheckpoint, check_shard, open_shards

_INDEX = ".safetensors.index.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path: A safetensors file or a zipped pickle, whatever its suffix; an index of shards; a folder of shards or
            with one checkpoint; or a diffusers pipeline's folder, of which the transformer is taken.

    Returns:
        Names, shapes and dtypes; tensors are read one by one.

    Raises:
        ValueError: If it is none of these, is damaged, or wants to load more than tensors.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(f"checkpoint '{path}' does not exist.")
    if path.name.endswith(_INDEX):
        return open_shards(path.parent, index=path)
    if detect_container(path) == "pickle":
        return PickleCheckpoint(path)
    check_shard(path)
    return SafetensorsCheckpoint(path, [path])


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    shards = open_shards(folder)
    if shards is not None:
        return shards
    pickles = sorted(file for file in folder.glob("*") if file.suffix in _PICKLES)
    if len(pickles) == 1:
        return open_checkpoint(pickles[0])
    if pickles:
        raise ValueError(
            f"'{folder}' holds {len(pickles)} checkpoints ({', '.join(p.name for p in pickles)}): name one."
        )
    raise ValueError(f"'{folder}' holds no checkpoint: give a .safetensors or .pt file, or a folder of shards.")
