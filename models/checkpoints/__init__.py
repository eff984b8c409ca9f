"""From a checkpoint of any family, as it was published, to a diffusers folder; and what a file is."""

from longtake.models.checkpoints.checkpoint import Checkpoint, TensorInfo, choose_entry
from longtake.models.checkpoints.converting import (
    DTYPES,
    Conversion,
    ConversionRequest,
    check_output,
    describe_checkpoint,
    plan_conversion,
    summarise,
)
from longtake.models.checkpoints.files import open_checkpoint
from longtake.models.checkpoints.identify import Identity, identify
from longtake.models.checkpoints.lora import Adapter, read_adapter
from longtake.models.checkpoints.parts import OutputTensor, parse_bytes, write_weights
from longtake.models.checkpoints.transformer import Transformer, expected_shapes, find_transformer

__all__ = [
    "Adapter",
    "Checkpoint",
    "Conversion",
    "ConversionRequest",
    "DTYPES",
    "Identity",
    "OutputTensor",
    "TensorInfo",
    "Transformer",
    "check_output",
    "choose_entry",
    "describe_checkpoint",
    "expected_shapes",
    "find_transformer",
    "identify",
    "open_checkpoint",
    "parse_bytes",
    "plan_conversion",
    "read_adapter",
    "summarise",
    "write_weights",
]
