"""Networks of the user behind six interfaces: every way to give them, everything that can be wrong with them."""

import hashlib
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from longtake.evaluation.backbones import ROLES, Backbones, load_backbones
from longtake.evaluation.backbones.loading import _adapt, _file_sha256

STUBS = Path(__file__).resolve().parents[1] / "golden" / "vbench" / "stubs.py"

# One backbone for each role, called as its authors call it.
ALL = """
    import torch
    from torch import nn

    class Dino(nn.Module):
        def forward(self, x):
            return x.flatten(2).mean(2)

    class _Clip:
        def encode_image(self, x):
            return x.flatten(2).amax(2).half()

    def make_clip():
        return _Clip()

    def build_aesthetic_head():
        return nn.Linear(768, 1)

    class StubMusiq:
        def __call__(self, x):
            return x.mean().reshape(1, 1)

    class Raft(nn.Module):
        def forward(self, image1, image2, iters=12, flow_init=None, test_mode=False):
            flow = torch.full((1, 2, *image1.shape[-2:]), float(iters))
            return (flow[..., ::8, ::8], flow) if test_mode else [flow]

    class load_AMT:
        def __call__(self, in_0, in_1, embt, scale_factor=2.0, eval=False):
            time = float(embt)
            return {"imgt_pred": (1 - time) * in_0 + time * in_1 + (scale_factor - 1) + (not eval)}

    class ViCLIP:
        def encode_vision(self, clips, test=False):
            return clips.flatten(2).mean(2) if test else None
        def encode_text(self, text):
            return torch.tensor([float(len(text))] * 8)

    class DINOv2(Dino):
        name = "dino_v2_small"

    class build_dream_sim:
        def embed(self, x):
            return x.flatten(1)[:, :5]

    # No role has these names.
    stub_load_raft = musiq_helper = text_vec = load = GritDet = _Clip
"""


@pytest.fixture
def file_of(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def failing(file_of, text, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        load_backbones(file_of(text, **options))
    assert "Traceback" not in str(caught.value)


def test_the_golden_stand_ins_load_as_they_are():
    backbones = load_backbones(STUBS)
    assert set(backbones.names) == set(ROLES) - {"aesthetic_clip"}
    assert (backbones.names["dinov2"], backbones.names["aesthetic_head"]) == ("StubDino2", "stub_aesthetic_head")
    assert backbones.files == {"stubs.py": hashlib.sha256(STUBS.read_bytes()).hexdigest()}
    assert not any(backbones.get(role).official for role in backbones.names)


def test_every_role_is_called_as_its_authors_do(file_of):
    backbones = load_backbones(file_of(ALL))
    assert set(backbones.names) == set(ROLES) - {"aesthetic_clip"}
    assert backbones.names["dinov2"] == "dino_v2_small" and backbones.names["clip"] == "make_clip"
    image = torch.rand(2, 3, 8, 16)
    for role, shape in (("dino", (2, 3)), ("clip", (2, 3)), ("dinov2", (2, 3)), ("dreamsim", (2, 5))):
        features = backbones.get(role).encode(image)
        assert features.shape == shape and features.dtype == torch.float32
    head = backbones.get("aesthetic_head")
    assert head.rate(torch.rand(2, 768)).shape == (2, 1) and not head.rate(torch.rand(2, 768)).requires_grad
    assert backbones.get("musiq").score(torch.ones(1, 3, 4, 4)) == 1.0
    # RAFT's 20 iterations and full-size flow; AMT's half-way time, scale 1 and evaluation.
    assert torch.equal(backbones.get("raft").flow(image[:1], image[:1]), torch.full((2, 8, 16), 20.0))
    middle = backbones.get("amt").middle(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    assert torch.equal(middle, torch.full((1, 3, 4, 4), 0.5))
    assert backbones.get("viclip").encode_video(torch.rand(1, 8, 3, 4, 4)).shape == (1, 8)
    assert backbones.get("viclip").encode_text("abc").tolist() == [[3.0] * 8]


def test_the_roles_own_interfaces_work_too():
    class Everything:
        encode = encode_video = staticmethod(lambda images: images.flatten(1))
        flow = staticmethod(lambda a, b: torch.zeros(2, *a.shape[-2:]))
        middle = staticmethod(lambda a, b: a)
        score = staticmethod(lambda image: 3)
        rate = staticmethod(lambda features: features[:, :1])
        encode_text = staticmethod(lambda text: torch.zeros(1, 4))

    image, model = torch.rand(1, 3, 8, 8), nn.Sequential(nn.Flatten(), nn.Dropout(0.9))
    assert torch.equal(_adapt("dino", model, name="x").encode(image), image.flatten(1)), "set to evaluation"
    made = {role: _adapt(role, Everything(), name="all") for role in ROLES}
    assert made["dino"].encode(image).shape == (1, 192)
    assert made["raft"].flow(image, image).shape == (2, 8, 8)
    assert torch.equal(made["amt"].middle(image, image), image)
    assert made["musiq"].score(image) == 3.0
    assert made["aesthetic_head"].rate(torch.rand(2, 768)).shape == (2, 1)
    assert made["viclip"].encode_video(image[None]).shape == (1, 192)


def test_what_a_file_imports_it_does_not_offer_and_files_of_one_name_do_not_mix(file_of, tmp_path):
    failing(file_of, "from torch.nn import Linear as Dino\n_Clip = Dino\n", "offers no backbone")
    text = "from torch.nn import Linear\nfrom functools import partial\naesthetic_head = partial(Linear, 768, 1)\n"
    assert load_backbones(file_of(text)).names == {"aesthetic_head": "aesthetic_head"}
    names = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        path = file_of(f"class Dino:\n    name = {folder!r}\n    __call__ = len\n", f"{folder}/nets.py")
        names.append(load_backbones(path).names["dino"])
    assert names == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "mine.py offers no backbone: name a public class or function after its role"),
        ("def dino(:\n", "cannot run the backbones file .*SyntaxError"),
        ("import no_such_package_at_all\n", "cannot run the backbones file .*ModuleNotFoundError"),
        ("class Dino: ...\ndef make_dino(): ...\n", "two backbones for 'dino', Dino and make_dino"),
        (
            "def make_dino():\n    raise OSError('no weights')\n",
            r"mine.py: make_dino \(dino\) failed: OSError: no",
        ),
        ("def make_dino(depth): ...\n", r"make_dino \(dino\) failed: TypeError"),
        ("def make_dino(): ...\n", "gave nothing: it must return the network"),
        ("def make_dino():\n    return 7\n", "is int: it needs encode or encode_image or embed, or to be callable"),
        ("class ViCLIP:\n    def encode_text(self, text): ...\n", "needs encode_text and encode_video"),
        ("class Dino:\n    official = True\n    def __call__(self, x): ...\n", "official, without weights to show"),
        ("class Dino:\n    weights = 'gone.pth'\n    def __call__(self, x): ...\n", "cannot read gone.pth"),
        ("class Dino:\n    name = 'a b]'\n    def __call__(self, x): ...\n", "use letters, digits"),
    ],
)
def test_what_is_wrong_with_a_python_file_is_said(file_of, text, message):
    failing(file_of, text, message)


def test_other_files_are_refused_and_a_failed_one_leaves_no_module_behind(tmp_path, file_of):
    failing(file_of, "", "a .py file of factories or a .yaml file", name="mine.json")
    with pytest.raises(ValueError, match="no file of backbones at"):
        load_backbones(tmp_path / "gone.py")
    before = set(sys.modules)
    failing(file_of, "raise RuntimeError('half')\n", "RuntimeError: half")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("role", "output", "message"),
    [
        ("dino", "x", r"gave str, not a tensor"),
        ("dino", torch.zeros(2, 3, 4), r"shape \(2, 3, 4\): needs \(1, any\)"),
        ("clip", torch.zeros(3, 8), r"shape \(3, 8\): needs \(1, any\)"),
        ("dino", torch.full((1, 4), torch.nan), "gave NaN or infinity"),
        ("raft", (None, torch.zeros(1, 2, 4, 4)), r"shape \(2, 4, 4\): needs \(2, 8, 8\)"),
        ("raft", (None, None), "gave NoneType, not a tensor"),
        ("amt", {"pred": 0}, r"gave a dict with \['pred'\]: needs 'imgt_pred'"),
        ("amt", {"imgt_pred": torch.zeros(1, 3, 9, 8)}, r"needs \(1, 3, 8, 8\)"),
        ("musiq", torch.zeros(3), "gave 3 numbers for one image"),
        ("musiq", torch.tensor(torch.inf), "gave inf"),
        ("musiq", None, "gave NoneType, not a number"),
        ("aesthetic_head", torch.zeros(1), r"shape \(1,\): needs \(1, 1\)"),
    ],
)
def test_what_a_network_gives_is_checked(role, output, message):
    image = torch.rand(1, 3, 8, 8)
    calls = {"raft": "flow", "amt": "middle", "musiq": "score", "aesthetic_head": "rate"}
    arguments = {"raft": (image, image), "amt": (image, image), "aesthetic_head": (torch.rand(1, 768),)}
    backbone = _adapt(role, lambda *given: output, name="mine")
    with pytest.raises(ValueError, match=message) as caught:
        getattr(backbone, calls.get(role, "encode"))(*arguments.get(role, (image,)))
    assert f"backbone 'mine' ({role})" in str(caught.value)


def test_a_head_on_the_wrong_clip_says_so():
    """ViT-B/32 has 512 features: the commonest mistake is to give the background's CLIP to the aesthetic head."""
    head = _adapt("aesthetic_head", nn.Linear(768, 1), name="laion")
    with pytest.raises(ValueError, match="does not take features of length 512: .*'aesthetic_clip'"):
        head.rate(torch.rand(1, 512))


def test_the_clip_stands_in_for_the_aesthetic_one_but_not_officially(file_of):
    text = "class Clip:\n    weights = __file__\n    official = True\n    __call__ = len\n"
    backbones = load_backbones(file_of(text))
    assert backbones.get("clip").official and not backbones.get("aesthetic_clip").official
    assert backbones.get("clip").weights_sha256 == _file_sha256(Path(file_of(text)))
    both = load_backbones(file_of(text + "class AestheticClip(Clip):\n    name = 'large'\n", name="both.py"))
    assert both.get("aesthetic_clip").official and both.get("aesthetic_clip").name == "large"


class Exported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class ExportedRaft(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a, (b - a)[:, :2]


def scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_yaml_file_names_torchscript_and_factories(tmp_path, file_of):
    right = scripted(Exported(), tmp_path / "clip.pt")
    scripted(ExportedRaft(), tmp_path / "raft.pt")
    (tmp_path / "amt.pth").write_bytes(b"weights")
    file_of(
        "def make(path):\n    return lambda a, b, t: {'imgt_pred': a if path.endswith('amt.pth') else b}\n", "n.py"
    )
    text = f"""
        clip: {{torchscript: clip.pt, sha256: {right.upper()}, official: true}}
        raft: {{name: raft_things, torchscript: raft.pt}}
        amt: {{factory: "n.py:make", weights: amt.pth}}
        dino: {{factory: "longtake.evaluation.backbones.classical:_HogHist"}}
    """
    backbones = load_backbones(file_of(text, name="mine.yaml"))
    assert backbones.names == {"dino": "_HogHist", "clip": "clip", "raft": "raft_things", "amt": "make"}
    assert backbones.get("clip").weights_sha256 == right and backbones.get("clip").official
    assert backbones.get("amt").weights_sha256 == hashlib.sha256(b"weights").hexdigest()
    assert backbones.get("dino").weights_sha256 is None and not backbones.get("raft").official
    a, b = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    assert torch.equal(backbones.get("clip").encode(a), a.flatten(1))
    torch.testing.assert_close(backbones.get("raft").flow(a, b), (b - a)[0, :2])
    assert torch.equal(backbones.get("amt").middle(a, b), a)
    assert set(backbones.files) == {"mine.yaml", "n.py"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "offers no backbone"),
        ("- dino\n", "offers no backbone"),
        ("dino: [", "cannot read the backbones file"),
        ("dina: {torchscript: a.pt}", "unknown backbone role 'dina'.*Did you mean 'dino'"),
        ("dino: a.pt", "give a mapping with torchscript or factory"),
        ("dino: {torchscrip: a.pt}", "unknown key 'torchscrip'.*Did you mean 'torchscript'"),
        ("dino: {name: x}", "needs either torchscript: FILE or factory"),
        ("dino: {torchscript: a.pt, factory: 'm:f'}", "needs either torchscript: FILE or factory"),
        ("dino: {torchscript: a.pt, weights: b.pt}", "holds its weights"),
        ("dino: {torchscript: gone.pt}", "no file .*gone.pt; weights are not downloaded"),
        ("dino: {torchscript: junk.pt}", "junk.pt is no TorchScript file"),
        ("dino: {torchscript: junk.pt, sha256: abc}", "has SHA-256 [0-9a-f]{64}, not abc"),
        ("dino: {factory: 'mod'}", "is not MODULE:FUNCTION"),
        ("dino: {factory: 'math:sqrt', sha256: abc}", "sha256 without a file"),
        ("dino: {factory: 'no_such_module_here:f'}", "cannot import 'no_such_module_here'"),
        ("dino: {factory: 'math:no_such'}", "'math' has no function 'no_such'"),
        ("dino: {factory: 'math:pi'}", "'math' has no function 'pi'"),
        ("dino: {factory: 'gone.py:make'}", "no file .*gone.py"),
        ("dino: {factory: 'math:sqrt', official: true}", "math:sqrt failed"),
    ],
)
def test_what_is_wrong_with_a_yaml_file_is_said(tmp_path, file_of, text, message):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    failing(file_of, text, message, name="mine.yaml")


def test_nothing_runs_before_every_file_is_checked(tmp_path, file_of):
    file_of(f"def make():\n    open({str(tmp_path / 'ran')!r}, 'w').close()\n    return len\n", "n.py")
    (tmp_path / "raft.pt").write_bytes(b"junk")
    text = "dino: {factory: 'n.py:make'}\nraft: {torchscript: raft.pt, sha256: ff}\n"
    failing(file_of, text, "has SHA-256", name="mine.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_set_of_backbones():
    one = Backbones({"dino": _adapt("dino", len, name="mine")})
    assert one.get("aesthetic_clip") is None and "MUSIQ-SPAQ" in one.why_missing("musiq")
    with pytest.raises(ValueError, match="unknown backbone role 'raf'.*Did you mean 'raft'"):
        one.get("raf")
    with pytest.raises(ValueError, match="unknown backbone role"):
        Backbones({"net": None})
