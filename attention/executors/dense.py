"""Dense attention: PyTorch's own, and AMD's for bfloat16 on the CPU."""

from torch import Tensor

from longtake.attention.executors.base import FLOATS, Executor, Limits
from longtake.attention.lse import attend
from longtake.attention.plan import BlockPlan
from longtake.attention.requests import AttentionRequest, Reason, Verdict
from longtake.attention.zentorch import unavailable, zentorch


class Sdpa(Executor):
    """PyTorch's fused attention, on every device; it takes plans that leave nothing out."""

    name = "sdpa"
    limits = Limits(devices=("cpu", "cuda", "mps", "xpu"), dtypes=FLOATS, plans="per_head")
    verified_on = frozenset({"cpu", "cuda"})

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        if request.plan is not None and not request.plan.is_full:
            text = f"it computes every pair, and the plan keeps {request.plan.density:.0%} of them"
            reasons = (*reasons, Reason("feature", text, "Take 'sdpa_masked' for PyTorch's attention with a mask."))
        return Verdict(reasons)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return attend(q, k, v, scale=scale, return_lse=return_lse)


class Zentorch(Executor):
    """AMD's fused attention in bfloat16, see ``longtake.attention.zentorch``."""

    name = "zentorch"
    limits = Limits(devices=("cpu",), dtypes=Sdpa.limits.dtypes[-1:], lse=False, grouped=False, backward=False)
    verified_on = frozenset({"cpu"})

    @classmethod
    def available(cls) -> Verdict:
        reason = unavailable()
        if reason is None:
            return Verdict()
        text, _, remedy = reason.partition(": ")
        code = "arch" if "AVX512" in text else "missing_package" if "not installed" in text else "version"
        return Verdict((Reason(code, text, f"{remedy[:1].upper()}{remedy[1:]}."),))

    @classmethod
    def supports(cls, request: AttentionRequest) -> Verdict:
        reasons = super().supports(request).reasons
        if request.has_scale:
            reasons = (*reasons, Reason("feature", "it scales scores by head_dim ** -0.5 only"))
        return Verdict(reasons)

    def _execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return zentorch(q, k, v), None
