"""Downloads with the real huggingface_hub against a server on this machine that speaks the hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from fewbits import hub
from fewbits.errors import FewbitsError, UsageError

FIXTURE = Path(__file__).parent / "fixtures" / "w4a16-asym-g32-head-f32"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "maker/model"
LARGE = "extra.safetensors"  # larger than what the client reads at once, 10 MB
CUT = 12_000_000  # bytes of it after which the first connection breaks


@dataclass
class Hub:
    """One repository. `asked` lists (method, path, Range) of what came in; `break_off` cuts one connection."""

    files: dict[str, bytes]
    endpoint: str = ""
    break_off: bool = False
    gated: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fetched(self) -> set[str]:
        return {path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path}


def handler(served: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            served.asked.append((self.command, path, self.headers.get("Range")))
            api = f"/api/models/{REPOSITORY}"
            if not path.startswith((api, f"/{REPOSITORY}/")):
                self.refuse(401, "RepoNotFound")  # as the hub answers those who aren't logged in
            elif served.gated and not path.startswith(api):
                self.refuse(401, "GatedRepo")
            elif path.startswith(f"{api}/tree/"):
                self.send([self.entry(name) for name in served.files])
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": name} for name in served.files]
                self.send({"id": REPOSITORY, "sha": COMMIT, "siblings": names, "private": False})
            elif path.startswith(f"{api}/revision/"):
                self.refuse(404, "RevisionNotFound")
            else:
                self.send_file(path.partition("/resolve/")[2].partition("/")[2], body)

        def entry(self, name: str) -> dict[str, Any]:
            content = served.files[name]
            return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def send_file(self, name: str, body: bool) -> None:
            if name not in served.files:
                self.refuse(404, "EntryNotFound")
                return
            content = served.files[name]
            begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if begin else 200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - begin))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not body:
                return
            if served.break_off and name == LARGE:
                served.break_off = False
                self.wfile.write(content[:CUT])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.wfile.write(content[begin:])

    return Handler


NOT_NEEDED = ("README.md", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "model.gguf")


@pytest.fixture
def served() -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in FIXTURE.iterdir() if not path.name.startswith("expected")}
    made = Hub(files | dict.fromkeys(NOT_NEEDED, b"not needed"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the connections that are cut here
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    made.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def run(checkpoint: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`fewbits run` in a process of its own: the client reads its environment once."""
    clean = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    environment = clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-m", "fewbits", "run", checkpoint, "--prompt-ids", "5,9", "--json", "--max-tokens", "3"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_only_needed_files_are_fetched_once(served: Hub, tmp_path: Path) -> None:
    done = run(REPOSITORY, served.endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] == 2
    assert served.fetched() == {"config.json", "generation_config.json", "model.safetensors"}
    served.asked.clear()
    assert run(REPOSITORY, served.endpoint, tmp_path).stdout.startswith('{"text"')
    assert served.fetched() == set()


def test_the_cache_serves_when_there_is_no_network(served: Hub, tmp_path: Path) -> None:
    online = run(f"{REPOSITORY}@main", served.endpoint, tmp_path)
    offline = run(REPOSITORY, "http://127.0.0.1:1", tmp_path)
    assert offline.returncode == 0, offline.stderr
    ids = [json.loads(done.stdout)["token_ids"] for done in (online, offline)]
    assert ids[0] == ids[1]


def test_a_broken_download_goes_on_where_it_stopped(served: Hub, tmp_path: Path) -> None:
    served.files[LARGE] = bytes(range(250)) * 60_000
    served.break_off = True
    done = run(REPOSITORY, served.endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    [first, second] = [asked for method, path, asked in served.asked if method == "GET" and path.endswith(LARGE)]
    assert first is None
    assert second is not None and 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= CUT
    [found] = tmp_path.glob(f"hub/models--maker--model/snapshots/*/{LARGE}")
    assert found.read_bytes() == served.files[LARGE]


@pytest.mark.parametrize(
    ("checkpoint", "gated", "says"),
    [
        ("maker/nothing", False, "no such repository"),
        ("maker/model@v9", False, "has no revision v9"),
        (REPOSITORY, True, "accepted its terms"),
    ],
)
def test_what_the_hub_does_not_give_is_explained(
    served: Hub, tmp_path: Path, checkpoint: str, gated: bool, says: str
) -> None:
    served.gated = gated
    done = run(checkpoint, served.endpoint, tmp_path)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert f"error: {checkpoint.partition('@')[0]}: " in done.stderr, done.stderr


def test_no_network_and_no_cache_is_explained(tmp_path: Path) -> None:
    done = run(REPOSITORY, "http://127.0.0.1:1", tmp_path)
    assert done.returncode == 2
    assert "can't be reached" in done.stderr and "Traceback" not in done.stderr


def test_mistrals_own_folder_needs_its_own_files(served: Hub, tmp_path: Path) -> None:
    served.files = {"params.json": b"{}", "consolidated.safetensors": b"short", "tekken.json": b"{}"}
    done = run(REPOSITORY, served.endpoint, tmp_path)
    assert served.fetched() == {"params.json", "consolidated.safetensors"}
    assert done.returncode == 2  # it has no weights


def test_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "maker" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("maker/model") == Path("maker/model")
    assert hub.resolve(Path("not/there")) == Path("not/there")


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "./a/b", "../b", "~/b", "/a/b", "a/b c", "a/b@"])
def test_what_is_neither_a_folder_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        hub.resolve(name)
    assert isinstance(caught.value, FewbitsError)
    assert caught.value.code == "checkpoint-not-found"
