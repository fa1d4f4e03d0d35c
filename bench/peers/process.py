"""A worker as its own process, asked questions: the other end of bench/peers/worker.py."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds for an answer


class WorkerError(Exception):
    """What a worker said it couldn't do, or that it is gone."""


class Worker:
    """`started`: seconds from the start of the process to its first token, once `wait` has seen it."""

    started: float

    def __init__(self, python: Path, name: str, model: Path, threads: int) -> None:
        script = Path(__file__).with_name(f"{name}_worker.py")
        command = [str(python), str(script), str(model), "--threads", str(threads)]
        self._talk = tempfile.TemporaryFile()
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._talk, env=_environment(threads)
        )

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Until there is a first token; False where it takes longer. Raises WorkerError."""
        if not self._speaks(seconds):
            return False
        self._answer()
        self.started = time.perf_counter() - self._began
        return True

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Raises WorkerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(f"it ended: {self._last_words()}") from None
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._talk.close()

    def _answer(self) -> dict[str, Any]:
        if not self._speaks(PATIENCE):
            raise WorkerError(f"no answer within {PATIENCE:.0f} s")
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"it ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _speaks(self, seconds: float) -> bool:
        # One answer a question: between questions the stream's buffer is empty, so that select sees all there is.
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def _last_words(self) -> str:
        self._talk.seek(0)
        lines = self._talk.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "without a word")


def _environment(threads: int) -> dict[str, str]:
    """What OpenMP programs take for the number of threads; no question goes to a hub."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
