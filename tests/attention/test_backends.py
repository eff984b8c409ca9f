"""Every backend against attention written out in float64; those that cannot run here, with kernels written out."""

import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import block_attention as reference
import pytest
import torch
from diffusers.models import attention_dispatch

from longtake.attention import BlockPlan, fastest, sdpa, zentorch
from longtake.attention.backends import BACKENDS, AttentionCall, find_backend, packages, pytorch
from longtake.attention.backends.base import AttentionRequest, BackendUnavailable
from longtake.attention.backends.packages import _zentorch_fault
from longtake.attention.backends.pytorch import _Flex, _flex_block_mask
from longtake.attention.plan import split_runs

FRAME = 200
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SPARSE = ["sdpa_masked", "gather_sdpa", "flex_eager"]
# queries, keys, heads, heads of keys, maps, block of queries, block of keys; frames: blocks aligned with them.
CASES = {
    "square": dict(queries=[384], keys=[384], heads=(2, 2), maps=1, blocks=(128, 128)),
    "square, small blocks": dict(queries=[384], keys=[384], heads=(2, 2), maps=2, blocks=(64, 64)),
    "cached": dict(queries=[256], keys=[1024], heads=(2, 2), maps=1, blocks=(128, 64)),
    "ragged": dict(queries=[350], keys=[700], heads=(2, 2), maps=2, blocks=(128, 128)),
    "grouped": dict(queries=[350], keys=[700], heads=(4, 2), maps=1, blocks=(64, 128)),
    "grouped, per head": dict(queries=[256], keys=[512], heads=(4, 2), maps=4, blocks=(128, 64)),
    "frames": dict(queries=[FRAME] * 3, keys=[FRAME] * 5, heads=(2, 2), maps=1, blocks=(128, 128)),
    "frames, per head": dict(queries=[FRAME] * 2, keys=[FRAME] * 5, heads=(4, 2), maps=4, blocks=(64, 128)),
    "wide blocks of queries": dict(queries=[FRAME] * 3, keys=[FRAME] * 5, heads=(2, 2), maps=2, blocks=(600, 64)),
    "one key": dict(queries=[130], keys=[1], heads=(2, 2), maps=1, blocks=(64, 64)),
    "one query": dict(queries=[1], keys=[300], heads=(2, 2), maps=2, blocks=(64, 64)),
}


def _plan(case, *, seed=0, density=0.4, orders=False):
    torch.manual_seed(seed)
    edges = [split_runs(case[name], block) for name, block in zip(("queries", "keys"), case["blocks"], strict=True)]
    mask = torch.rand(case["maps"], *(len(own) - 1 for own in edges)) < density
    mask[..., -1] |= ~mask.any(-1)
    perms = [None, None]
    if orders:
        heads = range(case["heads"][0])
        perms = [torch.stack([torch.randperm(sum(case[name])) for _ in heads]) for name in ("queries", "keys")]
    return BlockPlan.from_dense_block_mask(mask, *edges, q_perm=perms[0], k_perm=perms[1]).validate()


def _tokens(case, *, batch=2, head_dim=32, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    heads, kv_heads = case["heads"]
    lengths = (sum(case["queries"]), sum(case["keys"]))
    shapes = ((batch, lengths[0], heads, head_dim), *[(batch, lengths[1], kv_heads, head_dim)] * 2)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _run(name, *args, **options):
    return find_backend(name).run(AttentionCall(*args, **options))


def _written_out(q, k, v, plan=None, scale=None):
    mask = None if plan is None else reference.token_mask(plan, q.shape[2]).to(q.device)
    return reference.attention(q, k, v, mask, scale=scale)


def _assert_equal(name, q, k, v, plan, *, scale=None, with_lse=True):
    expected, sums = _written_out(q, k, v, plan, scale)
    tolerance = TOLERANCE[q.dtype]
    out, nothing = _run(name, q, k, v, plan, scale)
    assert nothing is None
    assert out.dtype == q.dtype and out.shape == q.shape
    assert (out - expected).abs().max() <= tolerance
    if with_lse:
        again, lse = _run(name, q, k, v, plan, scale, return_lse=True)
        assert lse.dtype == torch.promote_types(q.dtype, torch.float32) and lse.shape == sums.shape
        assert (again - expected).abs().max() <= tolerance
        assert (lse - sums).abs().max() <= tolerance * max(1.0, sums.abs().max().item())


PRECISIONS = [{"dtype": dtype} for dtype in (torch.float64, torch.float16, torch.bfloat16)]
VARIANTS = [
    *((case, {}) for case in CASES),
    # What is left after rounding the inputs: the reference sees the same rounded ones.
    *(("frames, per head", precision) for precision in PRECISIONS),
    *((case, {"orders": True}) for case in ("cached", "grouped", "frames, per head")),
    ("cached", {"scale": 0.1}),
]


@pytest.mark.parametrize(("case", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_plans_equal_the_reference(name, case, options):
    """Over all sizes, precisions, orders that are applied and undone, and scales."""
    options = dict(options)
    plan, scale = _plan(CASES[case], orders=options.pop("orders", False)), options.pop("scale", None)
    _assert_equal(name, *_tokens(CASES[case], **options), plan, scale=scale)


@pytest.mark.parametrize("case", ["grouped", "ragged", "one key", "one query"])
@pytest.mark.parametrize("options", [{}, *PRECISIONS, {"scale": 0.1}], ids=str)
def test_dense_attention_equals_the_reference(case, options):
    options = dict(options)
    scale = options.pop("scale", None)
    _assert_equal("sdpa", *_tokens(CASES[case], **options), None, scale=scale)


@pytest.mark.parametrize("name", SPARSE)
def test_edges_that_differ_by_head(name):
    """As clusters have them, empty ones among them."""
    q_edges = torch.tensor([[0, 30, 30, 100], [0, 10, 55, 100]], dtype=torch.int32)
    k_edges = torch.tensor([[0, 120, 150, 150, 300], [0, 1, 2, 200, 300]], dtype=torch.int32)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 1]]).bool().expand(2, -1, -1)
    plan = BlockPlan.from_dense_block_mask(mask, q_edges, k_edges).validate()
    _assert_equal(name, *_tokens({"queries": [100], "keys": [300], "heads": (2, 2)}), plan)


@pytest.mark.parametrize("name", SPARSE)
def test_inputs_stay_as_they_are_and_may_be_views(name):
    q, k, v = _tokens(CASES["frames"])
    wide = torch.cat([k, v], dim=-1)
    before = wide.clone()
    _assert_equal(name, q, wide[..., :32], wide[..., 32:], _plan(CASES["frames"]))  # as a fused projection leaves them
    assert torch.equal(wide, before)


@pytest.mark.parametrize("case", ["frames", "frames, per head"])
@pytest.mark.parametrize("name", ["sdpa_masked", "gather_sdpa"])
def test_gradients(name, case):
    plan, tokens = _plan(CASES[case]), _tokens(CASES[case], batch=1)
    with torch.inference_mode():  # what is kept of a plan must not be in the way of gradients
        _run(name, *tokens, plan)

    def gradients(run):
        leaves = [x.clone().requires_grad_() for x in tokens]
        (run(*leaves, plan)[0] ** 2).sum().backward()
        return [leaf.grad for leaf in leaves]

    for found, expected in zip(gradients(partial(_run, name)), gradients(_written_out), strict=True):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_rows_are_cut_into_bounded_parts(monkeypatch):
    """Less memory, the same numbers: rows of one size in several calls, keys of several blocks."""
    case = CASES["frames, per head"]
    monkeypatch.setattr(pytorch, "_MAX_GATHERED", 1)
    _assert_equal("gather_sdpa", *_tokens(case), _plan(case))


@pytest.mark.parametrize("name", SPARSE)
def test_a_wrong_list_is_noticed(name):
    """One block moved by one place: the tolerance is not so wide that it would pass."""
    tokens, plan = _tokens(CASES["frames"]), _plan(CASES["frames"])
    mask = plan.block_mask.clone()
    row = int((~mask[0].all(-1)).nonzero()[0])
    mask[0, row, mask[0, row].float().argmin()] = True
    wrong = BlockPlan.from_dense_block_mask(mask, plan.q_edges, plan.k_edges)
    assert (_run(name, *tokens, wrong)[0] - _written_out(*tokens, plan)[0]).abs().max() > 1e-3


def test_flex_ignores_lists_without_a_function_and_ours_has_one():
    """The trap: the same lists of blocks, without our function, give dense attention and no error."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tokens, plan = _tokens(CASES["square"]), _plan(CASES["square"])
    ours = _flex_block_mask(plan)
    lists = (ours.kv_num_blocks, ours.kv_indices, ours.full_kv_num_blocks, ours.full_kv_indices)
    bare = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=128)
    heads_first = [x.transpose(1, 2) for x in tokens]
    trapped = flex_attention(*heads_first, block_mask=bare).transpose(1, 2)
    sparse, dense = _written_out(*tokens, plan)[0], _written_out(*tokens)[0]
    assert (trapped - dense).abs().max() < 1e-5 and (trapped - sparse).abs().max() > 0.1
    assert (flex_attention(*heads_first, block_mask=ours).transpose(1, 2) - sparse).abs().max() < 2e-6


def test_flex_compiled_equals_the_reference_and_compiles_once_per_shape():
    """Frames, per-head maps, ragged ends and fewer heads of keys at once: a compilation takes long."""
    if not _Flex.available().ok or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("compiled flex needs AVX2 and a C++ compiler")
    case = CASES["frames, per head"]
    tokens = _tokens(case, batch=1)
    _assert_equal("flex", *tokens, _plan(case), with_lse=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        _assert_equal("flex", *tokens, _plan(case, seed=5, density=0.7), with_lse=False)


@pytest.mark.parametrize(
    ("name", "attribute", "flag"),
    [
        ("flash", "flash_attn_func", "_CAN_USE_FLASH_ATTN"),
        ("flash3", "_wrapped_flash_attn_3", "_CAN_USE_FLASH_ATTN_3"),
        ("xformers", "xops", "_CAN_USE_XFORMERS_ATTN"),
        ("sage", "sageattn", "_CAN_USE_SAGE_ATTN"),
    ],
)
def test_packages_are_called_through_diffusers(name, attribute, flag, monkeypatch):
    """The package's function as diffusers imports it, written out."""

    def kernel(*args, **options):
        q, k, v, *rest = args or [options[own] for own in "qkv"]
        scale = rest[-1] if rest else next(options[own] for own in ("softmax_scale", "sm_scale") if own in options)
        out, lse = reference.attention(q, k, v, scale=scale)
        lse = lse.transpose(1, 2) if name == "flash3" else lse
        wants = options.get("return_attn_probs") or options.get("return_lse") or name == "flash3"
        return (out.to(q.dtype), lse.float()) if wants else out.to(q.dtype)

    q, k, v = _tokens(CASES["cached"])
    with pytest.raises(BackendUnavailable, match=f"backend {name!r} is not usable.*Install with: pip install"):
        _run(name, q, k, v)
    module = SimpleNamespace(memory_efficient_attention=kernel) if name == "xformers" else kernel
    monkeypatch.setattr(attention_dispatch, attribute, module, raising=False)
    monkeypatch.setattr(attention_dispatch, flag, True)
    _assert_equal(name, q, k, v, None, scale=0.1, with_lse=BACKENDS[name].limits.lse)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "flex"])  # compiling takes long: its own test
def test_backends_that_are_not_here_are_skipped_with_their_reason(name):
    """On a machine that has one, it is run against the reference; elsewhere its reason is given."""
    backend = BACKENDS[name]
    device = "cpu" if "cpu" in backend.limits.devices else "cuda"
    if not backend.available().ok or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip(backend.available().text or "no CUDA device")
    dtype = backend.limits.dtypes[-1]
    plan = _plan(CASES["square"]) if backend.limits.plans == "only" else None
    q, k, v = (x.to(device) for x in _tokens(CASES["square"], dtype=dtype, head_dim=64))
    verdict = backend.supports(AttentionRequest.of(AttentionCall(q, k, v, plan)))
    if not verdict.ok:
        pytest.skip(verdict.text)
    expected, found = _written_out(q, k, v, plan)[0], _run(name, q, k, v, plan)[0]
    if backend.exact:
        assert (found - expected).abs().max() <= TOLERANCE[dtype]
    else:
        assert torch.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0) > 0.999


SHAPES = [(1, 48, 336, 6, 32), (2, 48, 337, 2, 24), (1, 130, 1561, 3, 64), (1, 300, 2000, 2, 128), (1, 1, 1, 1, 6)]


def _relative_error(attention, q, k, v):
    expected, _ = reference.attention(q, k, v)
    return ((attention(q, k, v).double() - expected).norm() / expected.norm()).item()


@pytest.mark.skipif(_zentorch_fault() is not None, reason=str(_zentorch_fault()))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zentorch_is_as_exact_as_sdpa_in_bfloat16(shape):
    batch, queries, keys, heads, head_dim = shape
    case = {"queries": [queries], "keys": [keys], "heads": (heads, heads)}
    q, k, v = ((2 * x).bfloat16() for x in _tokens(case, batch=batch, head_dim=head_dim))
    assert _relative_error(zentorch, q, k, v) < 1.05 * _relative_error(sdpa, q, k, v) + 1e-6
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(zentorch(q, *head_major), zentorch(q, k, v))


@pytest.mark.parametrize(
    ("capabilities", "reason", "dtype", "expected"),
    [
        ({"avx512_bf16": True}, None, torch.bfloat16, zentorch),
        ({"avx512_bf16": True}, None, torch.float32, sdpa),
        ({"avx512_bf16": True, "amx_bf16": True}, None, torch.bfloat16, sdpa),
        ({"avx512_bf16": True}, "not installed", torch.bfloat16, sdpa),
    ],
)
def test_the_fastest_is_taken(capabilities, reason, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(packages, "_zentorch_fault", lambda: reason)
    assert fastest(torch.device("cpu"), dtype) is expected
    assert fastest(torch.device("cuda"), dtype) is sdpa


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("torch.cpu.get_capabilities = lambda: {}", "this one has not got it: Use 'sdpa'"),
        (
            "torch.cpu.get_capabilities = lambda: {'avx512_bf16': True}; sys.modules['zentorch'] = None",
            "not installed: pip install 'longtake\\[zentorch\\]'",
        ),
    ],
)
def test_a_missing_backend_says_what_to_do(patch, message):
    code = (
        f"import sys, torch; {patch}\nfrom longtake.attention import zentorch\n"
        "x = torch.zeros(1, 1, 1, 6, dtype=torch.bfloat16)\nzentorch(x, x, x)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr
