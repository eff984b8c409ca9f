#!/bin/sh
# Wan's sampler takes n noise levels u = 1, 1 - 1/n, ..., 1/n and warps them by the flow shift s: s u / (1 + (s - 1) u). For four
# steps and s = 5 that is 1, .9375, .8333, .625. diffusers' UniPCMultistepScheduler with flow sigmas gives these levels.
# FlowMatchEulerDiscreteScheduler with the same number of steps and the same shift gives 1, .910, .717, .0244: its levels run
# down to the smallest training level instead of 1/n, and that level is warped when the scheduler is made and once more in
# set_timesteps. The last of four steps then removes 2 % of noise instead of 62 %. Exchanging one scheduler for the other in a
# few-step pipeline changes the picture for a reason that no setting shows; set_timesteps(sigmas=[1, .75, .5, .25]) gives both
# the same levels (given sigmas are warped too, once).
# Seen with diffusers 0.42.1, torch 2.13.0. A good guess would be: steps and shift decide the levels of any flow scheduler.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0
venv/bin/pip install -qq --disable-pip-version-check diffusers==0.42.1 numpy==2.4.6
cat > check.py <<'PY'
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
wanted = [5 * u / (1 + 4 * u) for u in (1.0, 0.75, 0.5, 0.25)]


def levels(scheduler, **arguments):
    scheduler.set_timesteps(**arguments)
    return scheduler.sigmas.tolist()[:-1]


def distance(found):
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


rows = {
    "Wan's own rule": wanted,
    "UniPC, 4 steps": levels(unipc, num_inference_steps=4),
    "Euler, 4 steps": levels(euler, num_inference_steps=4),
    "Euler, sigmas given": levels(euler, sigmas=[1.0, 0.75, 0.5, 0.25]),
}
print("diffusers", diffusers.__version__)
for name, row in rows.items():
    print(f"{name:20}", "  ".join(f"{level:.4f}" for level in row))
far = distance(rows["Euler, 4 steps"])
assert distance(rows["UniPC, 4 steps"]) < 2e-3 and distance(rows["Euler, sigmas given"]) < 1e-6
assert far > 0.6 and rows["Euler, 4 steps"][-1] < 0.03, "the behaviour has changed"
PY
venv/bin/python check.py
