"""Choice of a backend: verdicts as pure functions, errors that help, names that are followed."""

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import get_args

import block_attention as reference
import pytest
import torch

from longtake.attention import (
    BACKENDS,
    AttentionCall,
    AttentionGeometry,
    AttentionRequest,
    BackendUnavailable,
    BlockPlan,
    attention,
    explain,
    make_attention_policy,
    sparse_attention,
)
from longtake.attention import dispatch as dispatch_module
from longtake.attention.backends import Backend, base, packages
from longtake.attention.backends.base import FLOATS, Code, Limits, PlanFacts
from longtake.attention.backends.pytorch import attend
from longtake.attention.plan import split_runs, uniform_edges

PLAN = PlanFacts(density=0.4, num_heads=1, q_block=128, k_block=128, tile=256)
CPU = AttentionRequest(num_queries=768, num_keys=5376, num_heads=4, num_kv_heads=4, head_dim=64)
HOPPER = replace(CPU, device="cuda", capability=(9, 0), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_seen():
    """Every test begins without checks made."""
    dispatch_module._able.cache_clear()
    dispatch_module._faults.clear()
    yield
    dispatch_module._able.cache_clear()
    dispatch_module._faults.clear()


def _tokens(*, queries=256, keys=512, heads=2, kv_heads=2, batch=1, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((batch, queries, heads, 32), *[(batch, keys, kv_heads, 32)] * 2)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _plan(*, queries=256, keys=512, heads=1, seed=0):
    torch.manual_seed(seed)
    edges = uniform_edges(queries, 128), uniform_edges(keys, 64)
    mask = torch.rand(heads, len(edges[0]) - 1, len(edges[1]) - 1) < 0.4
    mask[..., 0] = True
    return BlockPlan.from_dense_block_mask(mask, *edges)


def _chosen(request, **options):
    return next((row.name for row in explain(request, **options) if row.is_chosen), None)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (CPU, "sdpa"),
        (replace(CPU, plan=PLAN), "gather_sdpa"),
        (replace(CPU, plan=replace(PLAN, density=1.0)), "sdpa"),
        (replace(CPU, num_queries=48, num_keys=96, plan=replace(PLAN, tile=4)), "sdpa_masked"),
        (replace(CPU, plan=replace(PLAN, num_heads=4), return_lse=True), "gather_sdpa"),
        (HOPPER, "sdpa"),
        (replace(HOPPER, plan=PLAN), "gather_sdpa"),
    ],
)
def test_what_auto_takes(request_, expected, monkeypatch):
    monkeypatch.setattr(dispatch_module, "fastest", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _chosen(request_) == expected


def test_auto_takes_amds_attention_where_it_is_the_fastest(monkeypatch):
    monkeypatch.setattr(dispatch_module, "fastest", lambda device, dtype: dispatch_module.zentorch)
    monkeypatch.setattr(packages, "_zentorch_fault", lambda: None)
    request = replace(CPU, dtype=torch.bfloat16)
    assert _chosen(request) == "zentorch"
    assert _chosen(replace(request, return_lse=True)) == _chosen(replace(request, has_scale=True)) == "sdpa"


def test_approximate_backends_are_never_automatic(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base, "_installed", lambda package, module, install: dispatch_module.Verdict())
    for allow in (False, True):
        row = next(row for row in explain(HOPPER, allow_approx=allow) if row.name == "sage")
        assert row.verdict.ok is allow and not row.is_chosen
    assert "quantised" in next(row for row in explain(HOPPER) if row.name == "sage").verdict.text


CUDA = {"device": "cuda", "dtype": torch.float16}


@pytest.mark.parametrize(
    ("name", "changes", "code", "words"),
    [
        ("flash", {}, "no_device", "no kernels for cpu, only for cuda"),
        ("flash", {"device": "cuda", "capability": (7, 5)}, "arch", "needs compute capability 8.0 or more"),
        ("flash", {"device": "cuda", "capability": (8, 0)}, "dtype", "takes float16, bfloat16, not float32"),
        ("flash", CUDA | {"head_dim": 320}, "head_dim", "up to 256"),
        ("flash3", CUDA | {"head_dim": 36}, "head_dim", "steps of 8, not 36"),
        ("flash", CUDA | {"plan": PLAN}, "feature", "no block sparsity"),
        ("xformers", {"device": "cuda", "num_kv_heads": 2}, "feature", "as many heads as queries, not 2 for 4"),
        ("gather_sdpa", {}, "feature", "only for block plans"),
        ("sdpa", {"plan": PLAN}, "feature", "keeps 40% of them"),
        ("flex", {"plan": PLAN, "return_lse": True}, "feature", "does not return the log-sum-exp"),
        ("flex", {"plan": PLAN, "needs_grad": True}, "feature", "no gradients"),
        ("flex_eager", {"plan": PLAN, "num_queries": 32760, "num_keys": 32760}, "feature", "holds all"),
        ("sage", CUDA | {"return_lse": True}, "feature", "log-sum-exp"),
        ("zentorch", {"dtype": torch.bfloat16, "has_scale": True}, "feature", "head_dim ** -0.5 only"),
    ],
)
def test_verdicts_are_functions_of_the_request(name, changes, code, words):
    verdict = BACKENDS[name].supports(replace(CPU, **changes))
    assert code in [reason.code for reason in verdict.reasons] and words in verdict.text


def test_every_backend_answers_every_request_with_known_codes():
    requests = [
        replace(CPU, device=device, dtype=dtype, plan=plan, return_lse=lse)
        for device in ("cpu", "cuda", "mps")
        for dtype in FLOATS
        for plan in (None, PLAN, replace(PLAN, num_heads=4, q_block=None))
        for lse in (False, True)
    ]
    for request in requests:
        rows = explain(request)
        assert [row.name for row in rows] == list(BACKENDS)
        assert {reason.code for row in rows for reason in row.verdict.reasons} <= set(get_args(Code))
        assert sum(row.is_chosen for row in rows) <= 1
        assert all(row.verdict.ok and row.exact for row in rows if row.is_chosen)


def test_verdicts_import_no_package():
    code = (
        "import sys\n"
        "from longtake.attention import AttentionRequest, explain\n"
        "explain(AttentionRequest(num_queries=8, num_keys=8, num_heads=1, num_kv_heads=1, head_dim=8))\n"
        "packages = {'flash_attn', 'flash_attn_interface', 'xformers', 'sageattention', 'zentorch'}\n"
        "print(sorted(packages & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name, cls in BACKENDS.items() if cls.package is not None])
def test_missing_packages_say_how_to_get_them_and_what_can_run_instead(name):
    if BACKENDS[name].available().ok:
        pytest.skip(f"{BACKENDS[name].package} is installed")
    q, k, v = _tokens()
    with pytest.raises(BackendUnavailable) as caught:
        attention(q, k, v, _plan(), backend=name, allow_approx=True)
    error = caught.value
    assert (error.backend, error.code) == (name, "missing_package")
    missing = f"package {BACKENDS[name].package!r} is not installed"
    assert f"backend {name!r} cannot run this call: {missing}" in str(error)
    assert "Install with: pip install" in error.hint and error.hint in str(error)
    usable = str(error).partition("Usable now for this call: ")[2].rstrip(".").split(", ")
    assert {"gather_sdpa", "sdpa_masked"} <= set(usable)
    assert "sdpa" not in usable, "dense attention is no way to run a plan"


def test_a_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailable, match="C\\+\\+ compiler.*gather_sdpa") as caught:
        attention(*_tokens(), _plan(), backend="flex")
    assert caught.value.code == "no_compiler"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 8, 2, 4), (1, 8, 2, 4), (1, 9, 2, 4)), "v in the shape of k"),
        (((8, 2, 4), (8, 2, 4), (8, 2, 4)), "give \\(batch, tokens, heads, head_dim\\)"),
        (((1, 8, 3, 4), (1, 8, 2, 4), (1, 8, 2, 4)), "heads of keys divide"),
        (((1, 8, 2, 4), (2, 8, 2, 4), (2, 8, 2, 4)), "batch and head_dim"),
        (((1, 0, 2, 4), (1, 8, 2, 4), (1, 8, 2, 4)), "at least one query"),
    ],
)
def test_tensors_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(*map(torch.zeros, shapes))


def test_plans_that_do_not_fit():
    q, k, v = _tokens()
    empty = torch.tensor([[True, False], [False, False]])
    empty = BlockPlan.from_dense_block_mask(empty, uniform_edges(256, 128), uniform_edges(512, 256))
    for args, options, message in (
        ((q, k, v, _plan(keys=640)), {}, "256 queries and 640 keys"),
        ((q, k, v, _plan(heads=3)), {}, "tells 3 heads apart but q has 2"),
        ((q, k, v, empty), {}, "reads no key"),
        ((q, k, v), {"backend": "gather_spda"}, "Did you mean 'gather_sdpa'"),
        ((q, k.double(), v), {}, "float32 on cpu, float64 on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*args, **options)


@pytest.mark.parametrize("heads", [1, 4])
def test_results_equal_the_reference(heads):
    """One map for all, and one per head."""
    tokens, plan = _tokens(heads=4, kv_heads=2, batch=2), _plan(heads=heads)
    expected, sums = reference.attention(*tokens, reference.token_mask(plan, heads))
    out, lse = attention(*tokens, plan, return_lse=True)
    assert (out - expected).abs().max() < 2e-6 and (lse - sums).abs().max() < 1e-5
    assert (attention(*tokens, plan) - expected).abs().max() < 2e-6


class _Wrong(Backend):
    """Right but for the last queries, or for the sums."""

    name = "gather_sdpa"
    limits = Limits(devices=("cpu",), dtypes=FLOATS, plans="only")
    verified_on = frozenset({"cpu"})
    spoils_sums = False

    def _execute(self, call):
        out, lse = attend(call, call.blocks.to_dense_mask()[None])
        if self.spoils_sums:
            return out, lse * 1.4427
        return out.clone().index_fill_(1, torch.tensor([call.q.shape[1] - 1]), 0), lse


@pytest.mark.parametrize("spoils_sums", [False, True])
def test_a_backend_that_computes_something_else_is_found_out(spoils_sums, monkeypatch):
    monkeypatch.setitem(BACKENDS, "gather_sdpa", _Wrong)
    monkeypatch.setattr(_Wrong, "spoils_sums", spoils_sums)
    monkeypatch.setattr(dispatch_module, "find_backend", lambda name: BACKENDS[name]())
    tokens, plan = _tokens(), _plan()
    expected, sums = reference.attention(*tokens, reference.token_mask(plan, 2))
    with pytest.raises(BackendUnavailable, match="computes something else") as caught:
        attention(*tokens, plan, backend="gather_sdpa", return_lse=True)
    assert ("log-sum-exp" in str(caught.value)) is spoils_sums
    for _ in range(2):
        out, lse = attention(*tokens, plan, return_lse=True)
        assert (out - expected).abs().max() < 2e-6 and (lse - sums).abs().max() < 2e-6
    assert _chosen(AttentionRequest.of(AttentionCall(*tokens, plan, return_lse=True))) == "sdpa_masked"


def test_each_kind_of_call_is_checked_once_unless_its_numbers_say_nothing(monkeypatch):
    calls, check = [], dispatch_module._check
    monkeypatch.setattr(dispatch_module, "_check", lambda name, *args: calls.append(name) or check(name, *args))
    q, k, v = _tokens()
    attention(torch.full_like(q, torch.nan), k, v, _plan())
    for seed in range(3):
        attention(q, k, v, _plan(seed=seed))
    assert calls == ["gather_sdpa"] * 2
    attention(q, k[:, :448], v[:, :448], _plan(keys=448))
    attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), _plan(), backend="gather_sdpa")
    assert calls == ["gather_sdpa"] * 4
    assert list(dispatch_module._faults.values()) == [""] * 3, "not-a-number was not held against the backend"


@dataclass
class _Policy:
    """Keeps its own frame, and declines in the first layer."""

    is_static: bool = True
    calls: int = 0

    def plan(self, q, k, geometry, *, v=None, memory=None):
        self.calls += 1
        if memory is not None:
            memory["calls"] = memory.get("calls", 0) + 1
        if geometry.layer == 0:
            return None
        edges = split_runs([geometry.frame_tokens] * len(geometry.query_frames), 64)
        frames = torch.arange(len(edges) - 1) // 4
        return BlockPlan.from_dense_block_mask(frames[:, None] == frames, edges, edges)


@pytest.mark.parametrize("is_static", [True, False])
def test_policies_plan_and_may_decline(is_static):
    geometry = AttentionGeometry.bidirectional(2, (10, 20), layer=1, num_layers=2)
    q, k, v = _tokens(queries=400, keys=400, batch=2)
    policy = _Policy(is_static=is_static)
    memory = {}
    out = sparse_attention(q, k, v, geometry, policy=policy, memory=memory)
    own = torch.arange(400) // 200
    expected, _ = reference.attention(q, k, v, own[:, None] == own)
    assert (out - expected).abs().max() < 2e-6
    assert policy.calls == (1 if is_static else 2)
    assert memory == ({"calls": 1} if is_static else {("sample", 0): {"calls": 1}, ("sample", 1): {"calls": 1}})
    # Where the policy declines the call is dense, whatever plans are run with.
    first = replace(geometry, layer=0)
    dense = sparse_attention(q, k, v, first, policy=policy, backend="sdpa_masked")
    assert (dense - reference.attention(q, k, v)[0]).abs().max() < 2e-6
    with pytest.raises(ValueError, match="200 queries and 400 keys do not fit the geometry, which has 400 and 400"):
        sparse_attention(q[:, :200], k, v, geometry, policy=make_attention_policy("window"))
