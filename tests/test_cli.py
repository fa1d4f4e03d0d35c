"""The command as other programs see it: what goes where, and the exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
from drafters import DRAFTERS
from safetensors.numpy import load_file

from fewbits import cli

FIXTURES = Path(__file__).parent / "fixtures"
MODEL = FIXTURES / "w4a16-asym-g32-head-f32"  # runs natively; no tokenizer
DRAFTER = DRAFTERS / "bf16"  # of this model
EXAMPLE = Path(__file__).parents[1] / "examples" / "stdlib-lm" / "w4a16-asym"
COMMAND = [sys.executable, "-m", "fewbits"]
IDS = ["--prompt-ids", "5,9,33"]


def fewbits(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


def test_json_is_one_object_with_the_promised_keys() -> None:
    done = fewbits("run", MODEL, *IDS, "--json", "--max-tokens", "6")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "generated_tokens",
        "finish_reason",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "speculation",
    }
    assert result["prompt_tokens"] == 3
    assert result["generated_tokens"] == len(result["token_ids"]) <= 6
    assert result["text"] == ""
    assert result["speculation"] is None


def test_without_a_tokenizer_the_tokens_are_printed() -> None:
    wish = (*IDS, "--max-tokens", "6", "--temperature", "2")
    shown = fewbits("run", MODEL, *wish)
    ids = json.loads(fewbits("run", MODEL, *wish, "--json").stdout)["token_ids"]
    assert shown.stdout == ",".join(map(str, ids)) + "\n"
    assert "tokens/s" in shown.stderr


def test_logits_go_to_exactly_that_path(tmp_path: Path) -> None:
    expected = load_file(MODEL / "expected.safetensors")
    ids = ",".join(map(str, expected["input_ids"].tolist()))
    path = tmp_path / "logits.of.a.model"
    done = fewbits("run", MODEL, "--prompt-ids", ids, "--logits", path, "--max-tokens", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generated_tokens"] == 0
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    logits = np.load(path)
    theirs = expected["logits"].astype(np.float64)
    assert logits.dtype == np.float32 and logits.shape == theirs.shape
    assert np.linalg.norm(logits - theirs) < 0.02 * np.linalg.norm(theirs)


def test_seeds_and_sampling_options_reach_the_sampler() -> None:
    def tokens(*wish: str) -> list[int]:
        done = fewbits("run", MODEL, *IDS, "--json", "--max-tokens", "20", *wish)
        found: list[int] = json.loads(done.stdout)["token_ids"]
        return found

    hot = ("--temperature", "5")
    assert tokens(*hot) == tokens(*hot, "--seed", "0") != tokens(*hot, "--seed", "1")
    assert tokens() == tokens(*hot, "--top-k", "1") == tokens(*hot, "--top-p", "0.0001") == tokens(*hot, "--min-p", "1")


@pytest.fixture
def with_sampling(tmp_path: Path) -> Path:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 4.0, "top_p": 0.9}')
    return folder


def test_the_checkpoints_own_sampling_is_shown_and_used_when_asked_for(with_sampling: Path) -> None:
    def run(*wish: str) -> tuple[list[int], str]:
        done = fewbits("run", with_sampling, *IDS, "--json", "--max-tokens", "20", *wish)
        return json.loads(done.stdout)["token_ids"], done.stderr

    greedy, said = run()
    assert "temperature 4, top_p 0.9 (not used" in said
    model, said = run("--sampling", "model")
    assert "temperature 4, top_p 0.9\n" in said
    own, _ = run("--temperature", "4", "--top-p", "0.9")
    assert model == own != greedy
    assert run("--sampling", "model", "--temperature", "0")[0] == greedy


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required"),
        (("frobnicate",), "frobnicate"),
        (("run",), "FOLDER"),
        (("run", MODEL), "nothing to continue"),
        (("run", MODEL, "--prompt", "a", "--prompt-ids", "1"), "not allowed with"),
        (("run", MODEL, "--prompt-ids", "1,x"), "takes numbers"),
        (("run", MODEL, "--prompt-ids", "1", "--kv-dtype", "fp8"), "invalid choice"),
        (("run", MODEL, "--prompt-ids", ""), "at least one"),
        (("run", MODEL, "--prompt-ids", "96"), "token 96"),
        (("run", MODEL, "--prompt-ids", "1", "--chat"), "--chat"),
        (("run", MODEL, "--prompt", "text"), "tokenizer.json"),
        (("run", MODEL, "--chat", "--json"), "interactive"),
        (("run", MODEL, *IDS, "--temperature", "-1"), "temperature is -1"),
        (("run", MODEL, *IDS, "--top-p", "x"), "--top-p"),
        (("run", MODEL, *IDS, "--threads", "0"), "0 threads"),
        (("run", MODEL, *IDS, "--stop", "x"), "stop strings"),
        (("run", MODEL, *IDS, "--logits", MODEL / "no" / "folder"), "can't be written"),
        (("run", MODEL / "no" / "folder", *IDS), "no folder"),
        (("run", FIXTURES, *IDS), "config.json"),
        (("inspect",), "nothing to inspect"),
        (("inspect", MODEL, "--system"), "--system"),
        (("inspect", FIXTURES), "config.json"),
        (("inspect", MODEL, "--draft-layers", "1"), "needs --draft"),
        (("inspect", MODEL, "--draft", DRAFTER, "--draft-layers", "1;2"), "takes numbers"),
        (("inspect", MODEL, "--draft", MODEL / "no" / "folder"), "no folder"),
        (("demo", MODEL / "no" / "folder"), "no folder"),
    ],
)
def test_bad_use_is_explained_with_exit_code_2(arguments: tuple[object, ...], says: bytes) -> None:
    done = fewbits(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_as_well() -> None:
    done = fewbits("run", FIXTURES, *IDS, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "error: " in done.stderr


def test_layers_without_a_native_kernel_run_when_allowed(tmp_path: Path) -> None:
    tensors = make.llama_tensors(q_proj=make.dense(64, 64, np.float64))
    run = ("run", make.write(tmp_path, tensors, make.llama()), *IDS, "--max-tokens", "2")
    done = fewbits(*run)
    assert done.returncode == 2 and "--allow-reference" in done.stderr and not done.stdout
    done = fewbits(*run, "--allow-reference")
    assert done.returncode == 0, done.stderr


def test_a_fault_of_the_program_is_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise ZeroDivisionError("no reason")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("fewbits.commands.inspect.run", fail)
    try:
        assert cli.main(["inspect", "x"]) == 3
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert "a fault of fewbits: ZeroDivisionError: no reason" in said and "--debug" in said


def test_inspect_prints_the_object_even_with_errors(tmp_path: Path) -> None:
    fine = fewbits("inspect", MODEL, "--json")
    assert fine.returncode == 0 and json.loads(fine.stdout)["model"]["family"] == "llama"
    broken = fewbits("inspect", tmp_path, "--json")
    assert broken.returncode == 2
    found = json.loads(broken.stdout)
    assert found["schema"] == 1 and len(found["errors"]) == 1


def test_inspect_shows_a_drafter_beside_its_target() -> None:
    shown = fewbits("inspect", MODEL, "--draft", DRAFTER)
    assert shown.returncode == 0
    target, draft = shown.stdout.split("\ndrafter:\n")
    assert "model.layers" in target and "midlayer.self_attn.q_proj" in draft
    assert "  reads the states behind layers 0, 1, 2 (" in draft and "  its embedding is the model's (" in draft
    found = json.loads(fewbits("inspect", MODEL, "--draft", DRAFTER, "--draft-layers", "1,1,2", "--json").stdout)
    drafter = found["drafter"]
    assert found["model"]["family"] == "llama" and drafter["model"]["family"] == "eagle3"
    assert drafter["reads_behind_layers"] == [1, 1, 2] and drafter["because"] == "as asked"
    assert drafter["of_target"] == {"embedding": "it isn't stored"} and drafter["modules"]


def test_inspect_says_what_does_not_fit_beside_the_target(tmp_path: Path) -> None:
    for draft, code in ((MODEL, "draft-not-a-drafter"), (EXAMPLE.parent / "drafter-w8a8", "draft-mismatch")):
        shown = fewbits("inspect", MODEL, "--draft", draft)
        assert shown.returncode == 2 and f"  {code}: " in shown.stdout
        found = json.loads(fewbits("inspect", MODEL, "--draft", draft, "--json").stdout)
        assert not found["errors"] and [error.partition(":")[0] for error in found["drafter"]["errors"]] == [code]
    done = fewbits("inspect", MODEL, "--draft", tmp_path, "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["drafter"]["errors"]


def test_inspect_of_the_machine() -> None:
    found = json.loads(fewbits("inspect", "--system", "--json").stdout)
    assert found["cpu"]["tier"] in found["cpu"]["tiers"]
    shown = fewbits("inspect", "--system").stdout
    assert found["version"] in shown and found["cpu"]["tier"] in shown


def test_a_forced_tier_is_used_and_an_unknown_one_explained() -> None:
    forced = fewbits("inspect", "--system", "--json", env=os.environ | {"FEWBITS_ISA": "ref"})
    assert json.loads(forced.stdout)["cpu"]["tier"] == "ref"
    wrong = fewbits("run", MODEL, *IDS, env=os.environ | {"FEWBITS_ISA": "abacus"})
    assert wrong.returncode == 2 and "abacus" in wrong.stderr


def test_version_and_help() -> None:
    assert fewbits("--version").stdout.startswith("fewbits ")
    for command in ([], ["run"], ["inspect"], ["verify"], ["demo"]):
        done = fewbits(*command, "--help")
        assert done.returncode == 0 and "usage: fewbits" in done.stdout


def test_importing_loads_nothing_heavy_and_starts_nothing() -> None:
    check = (
        "import signal, sys, threading; before = [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "import fewbits, fewbits.cli\n"
        "heavy = {'numpy', 'tokenizers', 'jinja2', 'rich', 'huggingface_hub', 'fewbits._native'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import fewbits.engine.llm\n"
        "heavy = {'tokenizers', 'jinja2', 'rich', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
        "assert before == [signal.getsignal(s) for s in signal.valid_signals()]\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_quiet() -> None:
    running = subprocess.Popen(
        [*COMMAND, "inspect", str(MODEL), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait(60) == 0


@pytest.mark.parametrize(("sent", "code", "says"), [(signal.SIGINT, 130, b"interrupted\n"), (signal.SIGTERM, 143, b"")])
def test_signals(example_chat: Path, sent: signal.Signals, code: int, says: bytes) -> None:
    endless = [*COMMAND, "run", str(example_chat), "--prompt", "a", "--max-tokens", "100000"]
    running = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.read(1)  # it is generating
    running.send_signal(sent)
    _, said = running.communicate(timeout=60)
    assert running.returncode == code
    assert said == says


@pytest.fixture
def example_chat(tmp_path: Path) -> Path:
    """The example with a chat template, no end token and no limit to its context."""
    folder = tmp_path / "example"
    folder.mkdir()
    for path in EXAMPLE.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((EXAMPLE / name).read_text())
        (folder / name).unlink()
        config.pop("eos_token_id", None)
        config.pop("max_position_embeddings", None)
        (folder / name).write_text(json.dumps(config))
    return folder


def test_chat_from_a_pipe_answers_line_by_line(example_chat: Path) -> None:
    once = fewbits("run", example_chat, "--chat", "--prompt", "import os", "--max-tokens", "9", "--json")
    first = json.loads(once.stdout)["text"]
    done = fewbits("run", example_chat, "--chat", "--max-tokens", "9", input="import os\n\nclass A:\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(first)
    assert "Traceback" not in done.stderr
    raw = fewbits("run", example_chat, "--raw", "--prompt", "# user: import os\n", "--max-tokens", "9", "--json")
    assert json.loads(raw.stdout)["text"] == first


def test_chat_on_a_terminal(example_chat: Path) -> None:
    """Ctrl-C stops an endless answer, the next line is answered too, Ctrl-D ends."""
    pty = pytest.importorskip("pty")
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [*COMMAND, "run", str(example_chat), "--chat", "--max-tokens", "100000"])
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < end, seen
            seen += os.read(terminal, 1000)
        seen = seen[seen.index(text) + len(text) :]

    try:
        until(b"> ")
        for line in (b"import os\n", b"class A:\n"):
            os.write(terminal, line)
            until(line.strip())
            until(b"\r\n")
            until(b"\r\n")  # the answer has begun
            os.write(terminal, b"\x03")
            until(b"> ")
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(terminal)


def test_streamed_text_is_the_whole_text() -> None:
    wish = ("--prompt", "class Stack:", "--max-tokens", "40")
    whole = json.loads(fewbits("run", EXAMPLE, *wish, "--json").stdout)
    streamed = fewbits("run", EXAMPLE, *wish)
    assert streamed.stdout.removesuffix("\n") == whole["text"].removesuffix("\n")
    assert whole["generated_tokens"] == 40
    assert "in cache" in streamed.stderr or "memory limit" in streamed.stderr


def test_demo() -> None:
    done = fewbits("demo", EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def read_json(path):")
    assert len(done.stdout) > 100
    assert done.stdout == fewbits("demo", EXAMPLE).stdout
    assert "uint4 g128 asym" in done.stderr


def test_text_that_the_terminal_can_not_show_does_not_stop_it(example_chat: Path) -> None:
    done = fewbits(
        "run",
        example_chat,
        *("--prompt", "é€ 世界", "--max-tokens", "3"),
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
