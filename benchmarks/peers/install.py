"""Fill the peers' own virtual environment: `make peers`, run by that environment's Python.

The peers hold numpy and other packages at older versions than ours, so they never share `.venv`.
torch, torchvision and the decoders must install; a peer that cannot is left out, and `peers.json`
beside the environment's marker says why, so that a benchmark can print null with the reason.
"""

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
BASE = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "opencv-python-headless")
PEERS = {"webdataset": "webdataset", "litdata": "litdata", "streaming": "mosaicml-streaming"}


def pip_install(*names: str) -> str | None:
    """Install packages at the versions of constraints.txt; None, or the reason."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["-c", str(CONSTRAINTS), *names]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    return None if done.returncode == 0 else reason_of(done.stderr)


def reason_of(text: str) -> str:
    """The line of an error output that says most: pip's first ERROR, a traceback's last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors[:1] or lines[-1:] or ["no message"])[0]


def import_error(module: str) -> str | None:
    """None when the module can be imported in a fresh process, else the reason."""
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return None if done.returncode == 0 else reason_of(done.stderr)


def version_of(name: str) -> str:
    """An installed distribution's version, asked in a fresh process."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Install, try the imports, write `peers.json`."""
    if sys.prefix == sys.base_prefix:
        raise SystemExit("run this with the peers' own environment: make peers")
    absent: dict[str, str | None] = dict.fromkeys(PEERS)
    if pip_install(*BASE, *PEERS.values()):
        # One of them spoils the whole: find out which.
        error = pip_install(*BASE)
        if error:
            raise SystemExit(f"peers: {error}")
        absent = {peer: pip_install(name) for peer, name in PEERS.items()}
    facts: dict[str, dict[str, str | None]] = {}
    for peer, name in PEERS.items():
        reason = absent[peer] or import_error(peer)
        version = None if reason else version_of(name)
        facts[peer] = {"version": version, "absent": reason}
        print(f"{peer}: {version or f'absent: {reason}'}")
    Path(sys.prefix, "peers.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
