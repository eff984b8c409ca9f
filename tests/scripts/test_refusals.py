"""Bad words of every command: one line that names the value and the remedy, before a model is loaded, and no file."""

import shlex

import pytest
from make_checkpoint import write_family
from safetensors.torch import save_file

from longtake.models.tiny_vae import TinyLayout, TinyVae

REFUSED = {
    "generate": [
        ("x --cache atention_sink", "Did you mean 'attention_sink'"),
        ("x secnds=3", "Did you mean 'seconds'"),
        ("x --secnds 3", "--secnds"),
        ("x --seconds long", "--seconds"),
        ("''", "prompt is empty"),
        ("--seconds 3", "prompt is empty"),
        ("'a red' circle", "put the prompt into quotes"),
        ("--config none.yaml", "cannot read the configuration"),
        ("--prompts none.txt", "cannot read the prompts"),
        ("--prompts empty.txt", "holds no prompts"),
        ("--prompts bytes.txt", "cannot read"),
        ("x --model ./none cache.num_sink_frams=3", "Did you mean 'num_sink_frames'"),
        ("x --model ./none cache.num_context_frames=4", "num_sink_frames=3 and a block of 3 frames: use 6"),
        ("x --model ./none sampler.flow_shift=-1", "flow_shift=-1"),
        ("x --model ./none", "does not exist"),
        ("x model.device=cuda:99", "longtake: "),
        ("x --model self_forcing=tiny", "not of the size 1.3B", "num_layers=2 instead of 30"),
        ("x --model self_forcin=tiny", "Did you mean 'self_forcing'"),
        ("x --model self_forcing=", "self_forcing=FOLDER"),
        ("x --model self_forcing=tiny/nowhere", "does not exist"),
        ("x --model longlive=empty.pt", "longtake convert", "--preset longlive"),
        ("x --model longlive", "--model longlive=FOLDER"),
        ("x model.offload=model model.device=cpu", "model.offload='model'", "use 'none'"),
        ("x model.offload=disk", "'none', 'model', 'sequential'"),
        ("x --model wan=tiny model.any_size=true height=32 width=32", "rollout of 252 frames"),
        ("x --model longlive=tiny model.any_size=true cache.num_context_frames=5", "use 6 or more"),
        ("x --fast-vae wan.safetensors", "16 channels in a latent, this model has 12"),
        ("x --fast-vae none.pth", "does not exist"),
        ("x --numerics exact", "numerics"),
        ("x --numerics upstream --sampler multi_step", "few_step, rolling_window"),
    ],
    "convert": [
        ("none.pt", "does not exist"),
        ("text.pt", "is a text file"),
        ("{wan} --dtype int8", "dtype='int8'", "bfloat16"),
        ("{wan} --max-shard-size many", "'many'", "5GB"),
        ("{wan} --key generator", "no entry 'generator'"),
        ("{wan} --preset self_forcing", "does not fit the preset", "1.3B"),
        ("{wan} --preset self_forcin", "Did you mean 'self_forcing'"),
        ("{wan} --vae .", "needs --text-encoder and --tokenizer too"),
        ("{wan} --lora {wan} --lora-alpha 1", "unknown names"),
        ("{wan} --out", "--out"),
    ],
    "info": [
        ("empty.pt", "is empty"),
        ("self_forcin", "Did you mean 'self_forcing'"),
        ("tiny/vae", "no diffusers folder"),
        ("--plan", "no model is named"),
        ("nosuch --plan", "unknown model family or folder 'nosuch'"),
        ("mini --plan --memory 8X", "--memory '8X' is no size"),
        ("mini --plan --memory 0GB", "is no size"),
        ("mini --plan --batch 0", "--batch 0"),
        ("mini --plan --device tpu", "--device 'tpu'"),
        ("mini --plan cache.num_sink_frame=3", "Did you mean 'num_sink_frames'"),
        ("mini --plan --height 65", "height=65"),
        ("mini cache.num_sink_frames=3", "settings are for --plan"),
    ],
    "policies": [
        ("attention_sin", "Did you mean 'attention_sink'"),
        ("attention_sink --set num_sink_frames", "write key=value"),
        ("attention_sink --set num_sinks=4", "Did you mean 'num_sink_frames'"),
        ("attention_sink --explain --set num_context_frames=5", "use 6 or more"),
        ("attention_sink --explain --event recache", "write BLOCK:EVENT"),
        ("attention_sink --explain --layer 6", "layers 0 to 5"),
        ("attention_sink --explain --event 6:jump", "does not know the event 'jump'"),
        ("--explain", "give its name"),
    ],
    "attention explain": [
        ("--shape 1,2,3", "--shape='1,2,3' is not B,LQ,LK,H,D"),
        ("--shape 1,0,3,4,64", "five numbers above 0"),
        ("--dtype bfloat", "Did you mean 'bfloat16'"),
        ("--device cuda --capability hopper", "is not MAJOR.MINOR"),
        ("--kv-heads 5", "does not divide the 12 heads"),
    ],
    "attention show": [
        ("light_forcing", "chooses blocks by the tokens"),
        ("radail", "Did you mean 'radial'"),
        ("radial --grid 3x5", "ROWSxCOLUMNS with a product of 1560"),
        ("radial --set decay", "write key=value"),
        ("radial --frames 2 --block-frames 3", "--block-frames 3 is more than --frames 2"),
        ("radial --head 2 --frames 2", "--head 2 does not exist"),
    ],
}
WRITES = ("generate", "convert", "attention show")
CASES = [
    (f"{command} {'--out out ' if command in WRITES else ''}{words}", said)
    for command in REFUSED
    for words, *said in REFUSED[command]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """Models and files that the words name."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "tiny").symlink_to(tiny_folder, target_is_directory=True)
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    save_file(TinyVae(TinyLayout(latent_channels=16, widths=(8, 6, 6, 4))).state_dict(), folder / "wan.safetensors")
    (checkpoint,) = write_family(folder / "wan", "wan")
    return folder, checkpoint


@pytest.mark.parametrize(("words", "said"), CASES, ids=[words for words, _ in CASES])
def test_bad_words_are_one_line_and_leave_nothing(folder, refused, monkeypatch, words, said):
    place, checkpoint = folder
    monkeypatch.chdir(place)
    before = set(place.iterdir())
    refused(shlex.split(words.replace("{wan}", str(checkpoint))), *said)
    assert set(place.iterdir()) == before
