"""A package that is called vllm and serves completions, for tests of what starts, watches and ends the real one."""

from pathlib import Path

SERVER = """
import json, os, signal, subprocess, sys, threading
sys.path.insert(0, {tests!r})
from completions_server import Server

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + chr(10))
if "--fail" in sys.argv:
    sys.exit("(Worker pid=1) ValueError: no kernel for this model" + chr(10) + "RuntimeError: see above")
if "--hang" in sys.argv:
    threading.Event().wait()
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({pids!r}, "a") as pids:
    pids.write(f"{{os.getpid()}} {{worker.pid}}" + chr(10))


def end(number, frame):
    worker.kill()
    os._exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if "--deaf" in sys.argv else end)
server = Server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
server.models = [sys.argv[sys.argv.index("--served-model-name") + 1]]
server.script = os.environ.get("SCRIPT", "good").split(",")
server.serve_forever()
"""


class FakeVllm:
    """Where it is installed, and what became of its servers."""

    def __init__(self, folder: Path) -> None:
        self.site, self._log, self._pids = folder / "site", folder / "calls", folder / "pids"
        module = self.site / "vllm" / "entrypoints" / "openai"
        module.mkdir(parents=True)
        for package in (module, module.parent, module.parent.parent):
            (package / "__init__.py").write_text("")
        text = SERVER.format(tests=str(Path(__file__).parent), log=str(self._log), pids=str(self._pids))
        (module / "api_server.py").write_text(text)
        metadata = self.site / "vllm_fake-9.9.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-fake\nVersion: 9.9\n")
        (metadata / "top_level.txt").write_text("vllm\n")

    @property
    def calls(self) -> list[str]:
        """The command line of every start, as JSON."""
        return self._log.read_text().splitlines() if self._log.exists() else []

    @property
    def alive(self) -> list[int]:
        """Processes of its servers that still run."""
        pids = [int(pid) for line in self._pids.read_text().splitlines() for pid in line.split()]
        return [pid for pid in pids if _state(pid) not in ("", "Z")]

    @property
    def started(self) -> bool:
        return self._pids.exists()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
