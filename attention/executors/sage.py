"""SageAttention: dense, with the scores in eight bits (arXiv:2410.02367). Approximate, so only on request.

Written from the package's documented interface and not run by the project yet.
"""

from torch import Tensor

from longtake.attention.executors.base import Executor, Limits
from longtake.attention.plan import BlockPlan


class Sage(Executor):
    """Queries and keys are quantised to INT8, values to FP16 or FP8."""

    name = "sage"
    exact = False
    package = "sageattention"
    module = "sageattention"
    install = "pip install sageattention (1.x, Triton; version 2 is built from source)"
    limits = Limits(devices=("cuda",), min_capability=(8, 0), max_head_dim=128, lse=False, backward=False)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self._load().sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale), None
