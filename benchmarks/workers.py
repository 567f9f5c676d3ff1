"""Peers as processes in environments of their own, and a case's row from what they answer.

An environment is made when it is first needed, a worker asked line by line.

A worker script prints one line of JSON when it is ready and answers each line of JSON that it gets
with another, until its input ends. It imports nothing of this project.
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
    """A peer's process; affinity and environment variables are those of this one.

    Attributes:
        ready: what it said when it was ready.
    """

    def __init__(self, peer: str, script: str, *arguments: str):
        """Starts `script` of this folder in the environment of benchmarks/peers/PEER.txt.

        Raises:
            RuntimeError: there is no such environment, or the script ends.
        """
        path = pathlib.Path(__file__).with_name(script)
        self._process = subprocess.Popen(
            [_environment(peer), str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            RuntimeError: the answer is {"error": …}, or there is none.
        """
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
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


def compared(case: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Prints the line of a case, and returns its row of the benchmark's result.

    Args:
        case: its name.
        speeds: images a second of each repeat, of "ours" and of "peer"; medians are compared.
    """
    mine, theirs = (statistics.median(speeds[who]) for who in ("ours", "peer"))
    spread = ", ".join(f"{who} {min(v):.2f} to {max(v):.2f}" for who, v in speeds.items())
    print(f"{case:36} {mine:9.2f} {theirs:9.2f} {mine / theirs:8.2f}   ({spread})", flush=True)
    ratio = round(mine / theirs, 3)
    return {"case": case, "ours": round(mine, 3), "peer": round(theirs, 3), "ratio": ratio}


def _environment(peer: str) -> str:
    """The Python of the peer's environment, which is made if it is missing or out of date."""
    requirements = ROOT / "benchmarks" / "peers" / f"{peer}.txt"
    folder = ROOT / ".venv-peers" / peer
    python = folder / "bin" / "python"
    marker = folder / "requirements.sha256"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if python.exists() and marker.exists() and marker.read_text() == wanted:
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
    marker.write_text(wanted)
    return str(python)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it ended without a word"])[-1]
