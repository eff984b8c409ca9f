"""Ways to compute attention, one per file: each says what it can take, and runs it."""

from longtake.attention.executors.base import Executor, Limits
from longtake.attention.executors.registry import EXECUTORS, executor

__all__ = ["EXECUTORS", "Executor", "Limits", "executor"]
