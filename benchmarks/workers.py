"""Processes that run a peer in its own environment, and result rows that compare it with ours.

An environment is created on first use. A worker script prints one line of JSON when it is ready and
answers each input line of JSON with another line, until its input ends. It imports nothing of this
project.
"""

import hashlib
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Worker:
    """A peer's process; it inherits affinity and environment variables.

    Attributes:
        ready: its first line of JSON.
    """

    def __init__(self, peer: str, script: str, *arguments: str):
        """Starts `script` of this folder in the environment of benchmarks/peers/PEER.txt.

        Raises:
            RuntimeError: the environment cannot be created, or the script ends.
        """
        path = pathlib.Path(__file__).with_name(script)
        self._process = subprocess.Popen(
            [_peer_python(peer), str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = self._answer()

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
            RuntimeError: the answer is {"error": …}, or the process has ended.
        """
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout and self._process.stderr
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(_last_line(self._process.stderr.read()))
        return json.loads(line)

    def close(self) -> None:
        """Ends the process by ending its input."""
        self._process.communicate()


def comparison_row(case: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Prints the line of a case, and returns its result row, which compares medians.

    Args:
        case: its name.
        speeds: "ours" and "peer": images per second of each repeat.
    """
    our_speed, peer_speed = (statistics.median(speeds[who]) for who in ("ours", "peer"))
    spread = ", ".join(f"{who} {min(v):.2f} to {max(v):.2f}" for who, v in speeds.items())
    print(
        f"{case:36} {our_speed:9.2f} {peer_speed:9.2f} {our_speed / peer_speed:8.2f}   ({spread})",
        flush=True,
    )
    ratio = round(our_speed / peer_speed, 3)
    return {"case": case, "ours": round(our_speed, 3), "peer": round(peer_speed, 3), "ratio": ratio}


def _peer_python(peer: str) -> str:
    """Returns the Python of the peer's environment; creates it if it is missing or out of date."""
    requirements = ROOT / "benchmarks" / "peers" / f"{peer}.txt"
    folder = ROOT / ".venv-peers" / peer
    python = folder / "bin" / "python"
    marker = folder / "requirements.sha256"
    requirements_hash = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if python.exists() and marker.exists() and marker.read_text() == requirements_hash:
        return str(python)
    print(f"Making .venv-peers/{peer}: this happens once.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"its environment cannot be made: {_last_line(done.stderr)}")
    marker.write_text(requirements_hash)
    return str(python)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it ended without a word"])[-1]
