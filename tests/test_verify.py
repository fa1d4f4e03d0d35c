"""`fewbits verify`: sound checkpoints pass; broken on purpose, the right module is named."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import ml_dtypes
import numpy as np
import pytest

from fewbits import _native, cli, load
from fewbits.checkpoint.files import TensorReader, read_header
from fewbits.commands import verify as command
from fewbits.kernels.cpu import ops as cpu_ops
from fewbits.kernels.cpu import runner as cpu_runner
from fewbits.kernels.cpu.arrays import Gated
from fewbits.verify import Verification, modules, verify

FIXTURES = Path(__file__).parent / "fixtures"
SOUND = (
    "llama-bf16",
    "llama-tied-f32",
    "w4a16-asym-g32-embedding-head",
    "w4a16-sym-g32-tied-embedding",
    "w8a16-asym-tensor-head",
    "wna16-every-width-asym-g32-head",
    "qwen2-w4a16-asym-g32-head",
    "qwen3-w8a8-dynamic",
    "mistral-w4a16-asym-g32-head",
    "mixed-attention-w8a8-mlp-w4a16",
    "w8a8-static-asym",
    "w8a8-dynamic-kv-fp8-per-head",
    "w4afp8-g32-head",
    "fp8-static-head",
    "fp8-block-24x32-head",
    "nvfp4",
    "mxfp4",
    "mxfp8a16-head",
    "old-g-idx-asym",
)
MODEL = FIXTURES / "w4a16-asym-g32-head-f32"  # two layers, every module native
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """What the command changes in its process is put back."""
    handler, threads = signal.getsignal(signal.SIGTERM), _native.thread_count()
    yield
    signal.signal(signal.SIGTERM, handler)
    _native.set_thread_count(threads)


def module(found: Verification, name: str) -> Any:
    return next(module for module in found.modules if module.name == name)


def llama(folder: Path, **changes: Any) -> Path:
    """The small dense Llama with some tensors replaced, by name: an array, or what makes one of the old."""
    tensors = make.llama_tensors()
    for name, change in changes.pop("tensors", {}).items():
        tensors[name] = change(tensors[name].copy()) if callable(change) else change
    return make.write(folder, tensors, make.llama(**changes))


def filled(value: float) -> Callable[[Any], Any]:
    return lambda old: np.full_like(old, value)


def with_nan(old: Any) -> Any:
    old.reshape(-1)[5] = np.nan
    return old


# ---- sound checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUND)
def test_what_real_tools_wrote_passes(name: str) -> None:
    found = verify(FIXTURES / name)
    assert found.first_problem is None and found.not_run is None
    assert found.logits is not None and found.logits.tokens == 24
    assert found.logits.argmax_agreement >= 0.8
    # Where inputs are quantized, the last bit of a sum decides a code now and then, and all that follows is quantized
    # otherwise: as far as rounding the reference's own inputs to bfloat16 takes it, which is what the bound is made of.
    quantized = any(one.spec.act is not None for one in found.modules)
    limit = found.logits.bound if quantized else 0.02
    assert found.logits.relative_difference is not None and found.logits.relative_difference <= limit
    for one in found.modules:
        assert one.error is not None and one.bound is not None
        assert one.error <= one.bound < 0.01, one  # a share of |x| |w|: never more than bfloat16's rounding
        assert one.kernel is not None and (one.executed_as == "reference") == one.kernel.startswith("reference.")


def test_a_short_context_is_not_exceeded(tmp_path: Path) -> None:
    found = verify(llama(tmp_path, max_position_embeddings=5))
    assert found.ok and found.logits is not None and found.logits.tokens == 5


def test_an_unknown_family_is_checked_module_by_module(tmp_path: Path) -> None:
    expert = "model.layers.0.mlp.experts.3.w1"
    config = {"architectures": ["OwlForCausalLM"], "model_type": "owl"}
    found = verify(
        llama(tmp_path / "fine", tensors={f"{expert}.weight": make.dense(24, 64).tensors["weight"]}, **config)
    )
    assert found.ok and found.logits is None
    assert found.not_run is not None and "family" in found.not_run
    assert {UP, DOWN, expert, "lm_head", "model.embed_tokens"} <= {one.name for one in found.modules}
    assert all(one.error is not None for one in found.modules)
    zeros = {f"{expert}.weight": np.zeros((24, 64), make.BF16)}
    broken = verify(llama(tmp_path / "broken", tensors=zeros, **config))
    assert broken.first_problem == f"{expert}: all of its weights are zero"


def test_what_is_not_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama(tmp_path, tensors={"mtp.fc.weight": make.dense(8, 8).tensors["weight"]})
    assert verify(folder).not_checked == ["mtp.fc"]
    assert cli.main(["verify", str(folder)]) == 0
    assert "not checked, since fewbits doesn't run them: 1 modules, mtp.fc first" in capsys.readouterr().out


def test_progress_ends_where_it_said() -> None:
    steps: list[tuple[int, int]] = []
    verify(MODEL, lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert {total for _, total in steps} == {steps[-1][0]} and len(steps) > 20


# ---- kernels that are off --------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any], K: int = 128) -> None:
    """Native products of weights with K columns come from `change(runner, x)`; 128 are those of down_proj alone."""

    class Spoiled(cpu_runner.Runner):
        def __call__(self, x: Any, add_to: Any = None) -> tuple[Any, ...]:
            exact = super().__call__
            if x.shape[1] != K:
                return exact(x, add_to)
            outputs = change(exact, np.asarray(x))
            if add_to is None:
                return tuple(outputs)
            add_to += outputs[0]
            return (add_to,)

    monkeypatch.setattr(cpu_runner, "Runner", Spoiled)


def test_the_fixture_has_one_projection_with_that_many_columns() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["intermediate_size"] == 128 != config["hidden_size"]


def last_column_lost(run: Any, x: Any) -> Any:
    return run(np.concatenate([x[:, :-1], np.zeros((len(x), 1), np.float32)], axis=1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run, x: [y * np.float32(1.001) for y in run(x)], "is off by"),
        (last_column_lost, "is off by"),
        (lambda run, x: [y + np.float32(1e-3) for y in run(x)], "for zeros"),
        (lambda run, x: [np.where(np.abs(y) > 1e15, np.inf, y).astype(np.float32) for y in run(x)], "for huge numbers"),
        (lambda run, x: run(x) if len(x) > 1 else [y * np.float32(1 + 2**-22) for y in run(x)], "when it is alone"),
    ],
    ids=["scaled", "last-column", "shifted", "overflow", "alone"],
)
def test_a_kernel_that_is_off_is_found_at_its_module(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any], says: str
) -> None:
    spoil(monkeypatch, change)
    found = verify(MODEL)
    assert found.first_problem is not None
    assert found.first_problem.startswith(f"{DOWN}: ") and says in found.first_problem
    wrong = [one.name for one in found.modules if not one.ok]
    assert wrong == [DOWN, DOWN.replace(".0.", ".1.")], "errors don't add up, so the modules after it are fine"
    assert found.logits is not None


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        (lambda gate, up, limit: np.float32(1.1) * np.asarray(Gated(gate, up, limit)), "the logits differ by"),
        (lambda gate, up, limit: gate * np.float32(np.nan), "NaN or infinities"),
    ],
    ids=["off", "nan"],
)
def test_what_no_single_module_shows_the_logits_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gate: Any, says: str
) -> None:
    monkeypatch.setattr(cpu_ops, "Gated", gate)
    assert cli.main(["verify", str(MODEL), "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert all(one["ok"] for one in found["modules"]) and not found["ok"]
    assert says in found["first_problem"]


# ---- checkpoints that are broken -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "change", "says"),
    [
        (f"{UP}.weight", filled(0), "all of its weights are zero"),
        (f"{UP}.weight", with_nan, ""),  # said by the decoder or by the check
        ("model.embed_tokens.weight", with_nan, ""),
        ("model.embed_tokens.weight", filled(0), "all of its weights are zero"),
        ("model.layers.0.input_layernorm.weight", filled(0), "its output is all zeros"),
        ("model.layers.0.input_layernorm.weight", with_nan, "weight-nan"),
        ("model.layers.0.post_attention_layernorm.weight", filled(3e38), "its output holds NaN or infinities"),
        ("lm_head.weight", filled(3e38), "its output holds NaN or infinities"),
    ],
)
def test_the_module_with_bad_numbers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str, change: Callable[[Any], Any], says: str
) -> None:
    folder = llama(tmp_path / "model", tensors={tensor: change})
    assert cli.main(["verify", str(folder)]) == 1
    last = capsys.readouterr().out.splitlines()
    (failed,) = (line for line in last if line.startswith("failed: "))
    assert failed.startswith(f"failed: {tensor.removesuffix('.weight')}: ") and says in failed


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_nan_that_a_decoder_lets_through(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def decoded(planned: Any, row: Any, reader: Any) -> Any:
        linear, notices = load.decode(planned, row, reader)
        if row.name == UP and part == "weight":
            scale = linear.weight.scale.copy()
            scale[3] = np.nan
            linear = replace(linear, weight=replace(linear.weight, scale=scale))
        elif row.name == UP:
            linear = replace(linear, bias=with_nan(np.zeros(row.shape[0], np.float32)))
        return linear, notices

    monkeypatch.setattr(modules, "decode", decoded)
    where = "row 3 of its weight" if part == "weight" else "its bias"
    found = verify(MODEL)
    assert found.first_problem == f"{UP}: {where} holds NaN or infinities"
    assert found.not_run == f"stopped at {UP}" and [one.name for one in found.modules if not one.ok] == [UP]


def test_an_overflow_is_named_where_it_begins(tmp_path: Path) -> None:
    """The norm's output still fits float32; what q_proj makes of it doesn't."""
    found = verify(llama(tmp_path, tensors={"model.layers.0.input_layernorm.weight": filled(1e38)}))
    assert found.first_problem is not None
    assert found.first_problem.startswith("model.layers.0.self_attn.q_proj: its output holds")
    assert found.logits is None and found.not_run == "stopped at model.layers.0.self_attn.q_proj"
    assert module(found, UP).ok and module(found, UP).error is not None, "modules behind it are still checked"


def test_a_residual_stream_that_overflows_is_named_at_the_norm_behind_it(tmp_path: Path) -> None:
    big = {"model.embed_tokens": 3e38, "model.layers.0.self_attn.v_proj": 0.1, "model.layers.0.self_attn.o_proj": 3e35}
    found = verify(llama(tmp_path, tensors={f"{name}.weight": filled(value) for name, value in big.items()}))
    assert found.first_problem == "model.layers.0.post_attention_layernorm: what it is given holds NaN or infinities"


def test_bad_numbers_in_one_module_do_not_hide_the_next(tmp_path: Path) -> None:
    found = verify(llama(tmp_path, tensors={f"{UP}.weight": with_nan, "lm_head.weight": filled(0)}))
    assert [one.name for one in found.modules if not one.ok] == [UP, "lm_head"]


def test_a_bias_that_is_not_a_number(tmp_path: Path) -> None:
    bias = {f"{UP}.bias": with_nan(np.ones(96, ml_dtypes.bfloat16))}
    found = verify(llama(tmp_path, tensors=bias, mlp_bias=False))
    assert found.first_problem is not None and found.first_problem.startswith(f"{UP}: ")


def rewritten(folder: Path, name: str, tensor: str, value: Any) -> Path:
    """A fixture with one tensor replaced by a value."""
    path = FIXTURES / name / "model.safetensors"
    headers, _ = read_header(path, 0)
    with TensorReader([path], headers) as reader:
        tensors = {found: reader.read(found) for found in headers}
    tensors[tensor] = np.full_like(tensors[tensor], value)
    config = json.loads((FIXTURES / name / "config.json").read_text())
    return make.write(folder, tensors, config)


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("tiny-w4a16-asym-g16-head", f"{UP}.weight_scale", np.nan),
        ("tiny-w4a16-asym-g16-head", f"{UP}.weight_scale", -1),
        ("tiny-w8a8-kv-fp8", "model.layers.0.self_attn.k_scale", -1),
        ("nvfp4", f"{DOWN}.weight_global_scale", 0),
    ],
)
def test_a_bad_scale_is_a_finding_of_its_module(tmp_path: Path, name: str, tensor: str, value: float) -> None:
    found = verify(rewritten(tmp_path, name, tensor, value))
    owner = "model.layers.0.self_attn.k_proj" if tensor.endswith("k_scale") else tensor.rpartition(".")[0]
    assert found.first_problem is not None and found.first_problem.startswith(f"{owner}: ")
    assert "scale-invalid" in found.first_problem and found.logits is None
    others = ("lm_head", "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj")
    assert all(module(found, other).error is not None for other in others)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(FIXTURES / "mixed-attention-w8a8-mlp-w4a16"), "--json", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert {"schema", "modules", "logits", "ok", "first_problem"} <= set(found)
    assert found["schema"] == 1 and found["ok"] is True and found["first_problem"] is None
    assert set(found["logits"]) == {"relative_difference", "bound", "argmax_agreement", "tokens"}
    keys = {"name", "spec", "kernel", "executed_as", "error", "bound", "ok", "problem"}
    assert all(set(one) == keys for one in found["modules"])
    by_name = {one["name"]: one for one in found["modules"]}
    assert by_name[UP]["spec"] == "uint4 g32 asym × a16" and by_name[UP]["executed_as"] == "native"
    assert by_name["model.layers.0.self_attn.q_proj"]["kernel"] == "cpu.dot_int8"


def test_what_has_no_native_kernel_is_checked_in_the_reference(tmp_path: Path) -> None:
    tensors = make.llama_tensors(up_proj=make.dense(96, 64, np.float64))
    found = verify(make.write(tmp_path, tensors, make.llama()))
    assert found.ok and module(found, UP).executed_as == "reference"
    assert module(found, DOWN).executed_as == "native"


def test_json_of_a_broken_one_is_an_object_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama(tmp_path, tensors={f"{UP}.weight": with_nan})
    assert cli.main(["verify", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["ok"] is False and found["logits"] is None and found["not_run"] == f"stopped at {UP}"
    assert found["first_problem"].startswith(UP)


def test_people_see_the_worst_first_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(MODEL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("")
    shares = [float(line.split()[-1]) for line in lines[1:end]]
    assert shares == sorted(shares, reverse=True) and len(shares) == 9
    assert any(line.startswith("model.layers.*.mlp.down_proj") and " 2 " in line for line in lines)
    assert lines[-1] == "ok: 16 modules and the logits are within their bounds"


def test_many_problems_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(monkeypatch, lambda run, x: [y * np.float32(1.001) for y in run(x)])
    monkeypatch.setattr(command, "_MOST_PROBLEMS", 0)
    assert cli.main(["verify", str(MODEL)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:3]} == {DOWN, DOWN.replace(".0.", ".1.")}
    assert lines[-2].startswith(f"failed: {DOWN}: is off by")
    assert lines[-1] == "and 1 more (--json lists them all)"


def header_only(folder: Path) -> Path:
    return make.write(folder, make.llama_tensors(), make.llama(), header_only=True)


def header_only_of_an_unknown_family(folder: Path) -> Path:
    return make.write(folder, make.llama_tensors(), make.llama(architectures=["OwlForCausalLM"]), header_only=True)


def without_a_module(folder: Path) -> Path:
    return make.write(folder, make.llama_tensors(up_proj=None), make.llama())


def cut_short(folder: Path) -> Path:
    shutil.copytree(MODEL, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return folder


@pytest.mark.parametrize("broken", [header_only, header_only_of_an_unknown_family, without_a_module, cut_short])
def test_what_headers_show_ends_it_as_it_ends_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: Callable[[Path], Path]
) -> None:
    assert cli.main(["verify", str(broken(tmp_path / "model"))]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ")


def test_warnings_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bias = {f"{UP}.bias": np.ones(96, make.BF16)}
    assert cli.main(["verify", str(llama(tmp_path, tensors=bias, mlp_bias=False))]) == 0
    printed = capsys.readouterr()
    assert "warning: bias-unexpected" in printed.err and "warning" not in printed.out
