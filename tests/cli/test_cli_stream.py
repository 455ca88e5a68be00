"""`profile --stream-from-hub`: the profile of the local copy, without a snapshot and with a layer in memory at most."""

import json
import subprocess
import sys
from pathlib import Path

from hub_server import SIGNATURE, TOKEN, Hub

from expertcut.calibrate.profile import Profile
from expertcut.checkpoint import open_checkpoint

NAME = "org/model"
COMMAND = """
import pathlib, sys
from expertcut.calibrate.fetched import Fetched
from expertcut.checkpoint import remote
from expertcut.cli import run
remote.WAIT, remote.BLOCK, peak, begin = 0.001, 50_000, 0, Fetched.begin
def noted(self, infos):
    global peak
    begin(self, infos)
    peak = max(peak, self.nbytes)
Fetched.begin = noted
code = run(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(str(peak))
sys.exit(code)
"""


def profile(hub: Hub, folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    env = hub.environment(folder / "home", PYTHONPATH=root, OMP_NUM_THREADS="1")
    rest = ("--calibration", "builtin", "--tokens", 600, "--seq-len", 64)
    command = [sys.executable, "-c", COMMAND, folder / "peak", "profile", *args, *rest]
    done = subprocess.run(list(map(str, command)), env=env, text=True, capture_output=True, cwd=folder)
    assert TOKEN not in done.stdout + done.stderr and SIGNATURE not in done.stdout + done.stderr
    return done


def test_streamed_from_the_hub_equals_local(demo_model: Path, tmp_path: Path) -> None:
    local = open_checkpoint(demo_model)
    layers = [sum(t.nbytes for n, t in local.tensors.items() if n.startswith(f"model.layers.{i}.")) for i in range(4)]
    others = max(t.nbytes for n, t in local.tensors.items() if not n.startswith("model.layers."))
    with Hub() as hub:
        hub.add(NAME, demo_model)
        hub.fault(r"GET /cdn/", "reset", times=3, after=700)
        done = profile(hub, tmp_path, NAME, "--stream-from-hub", "-o", "streamed")
        assert done.returncode == 0, done.stderr
        peak = int((tmp_path / "peak").read_text())
        assert max(layers) <= peak <= max(*layers, others)
        assert not any(path.suffix == ".safetensors" for path in (tmp_path / "home").rglob("*"))
        sent = sum(request.sent for request in hub.log if request.path.startswith("/cdn/"))
        assert sent < 1.1 * local.nbytes
        done = profile(hub, tmp_path, demo_model, "-o", "local")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "peak").read_text() == "0"
        refused = profile(hub, tmp_path, NAME, "--stream-from-hub", "-o", "other", "--calibration", "self")
        assert refused.returncode == 2 and "self" in refused.stderr
    streamed, here = (Profile.load(tmp_path / name) for name in ("streamed", "local"))
    assert streamed.meta.source == NAME
    assert (tmp_path / "streamed/profile.safetensors").read_bytes() == (
        tmp_path / "local/profile.safetensors"
    ).read_bytes()
    first, second = (json.loads((tmp_path / name / "profile.json").read_text()) for name in ("streamed", "local"))
    assert first | {"source": second["source"]} == second
    assert here.meta.tokenizer == streamed.meta.tokenizer
