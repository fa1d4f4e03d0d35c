"""What `inspect` prints: the JSON contract key by key, numbers worked out by hand, and the table for people."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make import BF16, Raw, block, dense, integers, llama, llama_tensors, write

from fewbits.checkpoint import open_checkpoint
from fewbits.checkpoint.files import DTYPES
from fewbits.codes import CODES
from fewbits.errors import CheckpointError
from fewbits.load import decode, inspect
from fewbits.plan import LoadPlan, failed
from fewbits.report import failure_text, gigabytes, print_table, summary, to_json, write_json

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))

TOP = ["schema", "model", "modules", "leftovers", "kv_cache", "warnings", "errors", "memory"]
MODULE = """name kind shape weight act dtype tensors decided_by kernel executed_as reason""".split()
WEIGHT = ["kind", "bits", "block", "scale_dtype", "zero_point", "global_scale", "act_order"]
ACT = ["kind", "bits", "per", "group_size", "dynamic", "symmetric", "global_scale"]
KINDS = ["linear", "embedding", "head", "expert", "router", "norm", "conv", "other"]
EXECUTED = ["native", "reference", "dequantized", "refused", "not_run"]
DTYPE_NAMES = {dtype.name for _, dtype in DTYPES.values()}


def written(planned: LoadPlan) -> dict[str, Any]:
    stream = io.StringIO()
    write_json(planned, stream)
    assert stream.getvalue().endswith("}\n") and stream.getvalue().count("\n") == 1

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    result: dict[str, Any] = json.loads(stream.getvalue(), parse_constant=no_constant)
    return result


def is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def follows_the_contract(data: dict[str, Any]) -> None:
    assert list(data) == TOP and data["schema"] == 1
    assert list(data["model"]) == ["family", "parameters", "bytes", "format"]
    assert list(data["leftovers"]) == ["tensors", "config_keys", "patterns_without_match"]
    assert list(data["memory"]) == ["weights", "kv_per_token"]
    for module in data["modules"]:
        assert list(module) == MODULE
        assert module["kind"] in KINDS and module["executed_as"] in EXECUTED
        assert all(is_size(size) for size in module["shape"])
        assert module["tensors"] and isinstance(module["reason"], str) and module["decided_by"]
        assert module["dtype"] in DTYPE_NAMES
        assert module["kernel"] is None or "." in module["kernel"]
        assert module["executed_as"] == "native" or module["reason"], "what isn't native says why"
        weight, act = module["weight"], module["act"]
        if weight is not None:
            extra = ["exponent", "mantissa"] if weight["kind"] == "float" else []
            assert list(weight) == WEIGHT + extra and weight["kind"] in ("int", "uint", "float")
            assert len(weight["block"]) == 2 and all(type(size) is int and size > 0 for size in weight["block"])
            assert weight["scale_dtype"] in DTYPE_NAMES
            assert [type(weight[key]) for key in WEIGHT[4:]] == [bool] * 3
        if act is not None:
            assert weight is not None
            assert list(act)[: len(ACT)] == ACT and act["per"] in ("tensor", "token", "group")
            assert (act["group_size"] is not None) == (act["per"] == "group")
            assert [type(act[key]) for key in ACT[4:]] == [bool] * 3
    for line in (*data["warnings"], *data["errors"]):
        code, module, text = line.split(": ", 2)
        assert code in CODES and text
    for entry in data["kv_cache"] or []:
        assert list(entry) == ["layer", "kind", "bits", "per", "dynamic"]
        assert entry["per"] in ("tensor", "head", "token")


@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_follows_the_contract(name):
    data = written(inspect(FIXTURES / name))
    follows_the_contract(data)
    expected = FIXTURES / name / "expected.json"
    refused = expected.exists() and "refused" in json.loads(expected.read_text())
    assert bool(data["errors"]) == refused
    stored = open_checkpoint(FIXTURES / name).tensors
    shown = [tensor for module in data["modules"] for tensor in module["tensors"]] + data["leftovers"]["tensors"]
    assert set(shown) == stored.keys()
    assert data["model"]["bytes"] == sum(info.nbytes for info in stored.values())


def module_of(name: str, last: str) -> dict[str, Any]:
    data = to_json(inspect(FIXTURES / name))
    return next(module for module in data["modules"] if module["name"].rpartition(".")[2] == last)


def weight(kind: str, bits: int, block: list[int], scale: str, **more: Any) -> dict[str, Any]:
    flags = {"zero_point": kind == "uint", "global_scale": False, "act_order": False}
    return {"kind": kind, "bits": bits, "block": block, "scale_dtype": scale} | flags | more


def act(kind: str, bits: int, per: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    flags = {"dynamic": True, "symmetric": True, "global_scale": False}
    return {"kind": kind, "bits": bits, "per": per, "group_size": group} | flags | more


E4M3 = {"exponent": 4, "mantissa": 3}
E2M1 = {"exponent": 2, "mantissa": 1}


@pytest.mark.parametrize(
    ("name", "weights", "inputs"),
    [
        ("tiny-w4a16-asym-g16-head", weight("uint", 4, [1, 16], "bfloat16"), None),
        ("tiny-w4a16-sym-g16", weight("int", 4, [1, 16], "bfloat16"), None),
        ("tiny-w4a16-asym-channel-head", weight("uint", 4, [1, 32], "bfloat16"), None),
        ("w8a16-sym-tensor", weight("int", 8, [64, 64], "bfloat16"), None),
        ("w4a16-sym-g32-f32", weight("int", 4, [1, 32], "float32"), None),
        ("w4a16-sym-g32-head-f16", weight("int", 4, [1, 32], "float16"), None),
        ("old-g-idx-asym", weight("uint", 4, [1, 16], "bfloat16", act_order=True), None),
        ("old-unpacked-zero-points", weight("uint", 4, [1, 16], "bfloat16"), None),
        ("old-preset-list", weight("int", 8, [1, 32], "bfloat16"), act("int", 8, "token")),
        ("w8a8-dynamic-asym-head", weight("int", 8, [1, 64], "bfloat16"), act("int", 8, "token", symmetric=False)),
        (
            "w8a8-static-asym",
            weight("int", 8, [1, 64], "bfloat16"),
            act("int", 8, "tensor", dynamic=False, symmetric=False),
        ),
        (
            "fp8-block-head",
            weight("float", 8, [128, 128], "bfloat16", **E4M3),
            act("float", 8, "group", 128, **E4M3),
        ),
        (
            "nvfp4",
            weight("float", 4, [1, 16], "float8_e4m3fn", global_scale=True, **E2M1),
            act("float", 4, "group", 16, global_scale=True, **E2M1),
        ),
        ("mxfp4a16-head", weight("float", 4, [1, 32], "float8_e8m0fnu", **E2M1), None),
        ("mxfp8", weight("float", 8, [1, 32], "float8_e8m0fnu", **E4M3), act("float", 8, "group", 32, **E4M3)),
    ],
)
def test_specs(name, weights, inputs):
    found = module_of(name, "q_proj")
    rows, columns = found["shape"]
    if name == "w8a16-sym-tensor":
        weights["block"] = [rows, columns]
    elif weights["block"][0] == 1 and "channel" in name or name in ("old-preset-list",) or name.startswith("w8a8"):
        weights["block"] = [1, columns]
    assert (found["weight"], found["act"]) == (weights, inputs)
    assert list(found["weight"]) == list(weights)


def test_an_unquantized_module():
    found = module_of("tiny-w4a16-sym-g16", "lm_head")
    assert (found["weight"], found["act"], found["dtype"], found["shape"]) == (None, None, "bfloat16", [44, 32])


def test_numbers_by_hand():
    """One layer of 32 by 64, 2 heads of 16 of which one holds keys and values, 44 words."""
    data = to_json(inspect(FIXTURES / "tiny-w4a16-asym-g16-head"))
    attention, mlp, norms, table = 32 * 32 + 2 * 16 * 32 + 32 * 32, 3 * 32 * 64, 3 * 32, 44 * 32
    assert data["model"] == {
        "family": "llama",
        "parameters": attention + mlp + norms + 2 * table,
        "bytes": data["model"]["bytes"],
        "format": "compressed-tensors",
    }
    file = FIXTURES / "tiny-w4a16-asym-g16-head" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert data["model"]["bytes"] == file.stat().st_size - 8 - header
    assert data["memory"]["kv_per_token"] == 2 * 1 * 16 * 2  # keys and values, one head of 16, bfloat16
    assert data["kv_cache"] is None


def test_a_quantized_cache():
    data = to_json(inspect(FIXTURES / "tiny-w8a8-kv-fp8"))
    assert data["kv_cache"] == [{"layer": 0, "kind": "float", "bits": 8, "per": "tensor", "dynamic": False}]
    assert data["memory"]["kv_per_token"] == 2 * 1 * 16 * 1
    per_head = to_json(inspect(FIXTURES / "w8a8-dynamic-kv-fp8-per-head"))
    assert {entry["per"] for entry in per_head["kv_cache"]} == {"head"}


@pytest.mark.parametrize("name", ["tiny-w4a16-asym-g16-head", "w4a16-sym-g32-tied-embedding", "tiny-w8a8-dynamic-head"])
def test_memory_is_what_the_packed_weights_take(name):
    planned = inspect(FIXTURES / name)
    total = 0
    with planned.checkpoint.reader() as reader:
        for row in planned.rows:
            if row.kind == "norm":
                total += 4 * row.shape[0]
            else:
                linear, _ = decode(planned, row, reader)
                weight = linear.weight
                if row.kind == "embedding":  # codes as stored, scales and zero points in float32
                    total += weight.codes.nbytes
                    total += sum(4 * array.size for array in (weight.scale, weight.zero) if array is not None)
                else:
                    total += row.kernel.pack(linear).nbytes
    assert to_json(planned)["memory"]["weights"] == total


def test_parameters_count_biases_once_and_ties_once(tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, BF16)}
    plain = to_json(inspect(write(tmp_path / "a", llama_tensors(), llama())))
    biased = to_json(inspect(write(tmp_path / "b", llama_tensors() | bias, llama())))
    tied = to_json(inspect(write(tmp_path / "c", llama_tensors(lm_head=None), llama(tie_word_embeddings=True))))
    assert biased["model"]["parameters"] - plain["model"]["parameters"] == 64
    assert plain["model"]["parameters"] - tied["model"]["parameters"] == 40 * 64
    assert [module["tensors"] for module in tied["modules"] if module["name"] in ("lm_head", "model.embed_tokens")] == [
        ["model.embed_tokens.weight"]
    ] * 2


def test_parameters_of_packed_weights_are_logical(tmp_path):
    stored = integers(64, 64, 3, 32)
    quantized = llama(block(stored.weights, ["re:.*q_proj"]))
    packed = to_json(inspect(write(tmp_path / "a", llama_tensors(q_proj=stored), quantized)))
    plain = to_json(inspect(write(tmp_path / "b", llama_tensors(), llama())))
    assert packed["model"]["parameters"] == plain["model"]["parameters"]
    assert packed["model"]["bytes"] < plain["model"]["bytes"]


# ---- nulls ---------------------------------------------------------------------------------------------------------


def test_nothing_quantized():
    data = to_json(inspect(FIXTURES / "llama-bf16"))
    assert data["model"]["format"] is None and data["kv_cache"] is None
    assert {str(module["weight"]) for module in data["modules"]} == {"None"}


def test_an_unknown_family(tmp_path):
    tensors = dense(8, 8).under("a.b") | {"c.weight": np.ones(8, BF16), "d": np.ones((), np.float32)}
    data = written(inspect(write(tmp_path, tensors, {"architectures": ["X"]})))
    follows_the_contract(data)
    assert data["model"]["family"] is None and data["memory"]["kv_per_token"] is None
    assert data["memory"]["weights"] > 0 and data["model"]["parameters"] == 64 + 8 + 1
    assert {module["name"]: module["shape"] for module in data["modules"]} == {"a.b": [8, 8], "c": [8], "d": []}


def test_a_folder_that_cant_be_read():
    planned = failed(CheckpointError("json-invalid", "not valid JSON", module="config.json", hint="fetch it again"))
    data = written(planned)
    follows_the_contract(data)
    assert data["model"] == {"family": None, "parameters": None, "bytes": None, "format": None}
    assert data["modules"] == [] and data["memory"] == {"weights": None, "kv_per_token": None}
    assert data["errors"] == ["json-invalid: config.json: not valid JSON"]


def test_an_error_keeps_the_whole_object(tmp_path):
    stored = integers(64, 64, 4, 32)
    wrong = block(stored.weights | {"num_bits": 8}, ["re:.*q_proj"])
    data = written(inspect(write(tmp_path, llama_tensors(q_proj=stored), llama(wrong))))
    assert len(data["modules"]) == 12 and len(data["errors"]) == 1
    assert data["errors"][0].startswith("tensors-disagree: model.layers.0.self_attn.q_proj: config_groups.group_0: ")
    [refused] = [module for module in data["modules"] if module["executed_as"] == "refused"]
    assert refused["kernel"] is None and refused["weight"] is None


def test_leftovers(tmp_path):
    tensors = llama_tensors() | {"stray": np.ones(2, BF16)}
    quantized = block(None, ["Linear"], ignore=["nothing"], surprise={"a": 1})
    data = written(inspect(write(tmp_path, tensors, llama(quantized, another_key=5))))
    assert data["leftovers"] == {
        "tensors": ["stray"],
        "config_keys": ["another_key", "quantization_config.surprise"],
        "patterns_without_match": ["nothing"],
    }
    assert {line.partition(":")[0] for line in data["warnings"]} == {
        "tensors-unclaimed",
        "config-keys-unread",
        "pattern-no-match",
    }


def test_names_beyond_ascii(tmp_path):
    name = "schicht\N{LATIN SMALL LETTER O WITH DIAERESIS}.\N{GRINNING FACE}"
    data = written(inspect(write(tmp_path, dense(8, 8).under(name), {})))
    assert data["modules"][0]["name"] == name


# ---- for people --------------------------------------------------------------------------------------------------


def table(planned: LoadPlan) -> str:
    stream = io.StringIO()
    print_table(planned, stream)
    assert "\x1b" not in stream.getvalue(), "colours are for terminals"
    return stream.getvalue()


def test_modules_that_differ_in_numbers_are_one_line(tmp_path):
    tensors = {}
    for layer in (0, 1, 2, 5):
        tensors |= dense(8, 8).under(f"h.{layer}.q")
    tensors |= dense(16, 8).under("h.7.q")
    lines = table(inspect(write(tmp_path, tensors, {}))).splitlines()
    [folded] = [line for line in lines if "h.{0-2,5}.q" in line]
    assert folded.split()[1:3] == ["4", "8x8"]
    [single] = [line for line in lines if line.startswith("h.7.q")]
    assert single.split()[1:3] == ["1", "16x8"]


def test_two_numbers_of_a_name(tmp_path):
    tensors = {}
    for layer in range(2):
        for expert in range(3):
            tensors |= dense(8, 8).under(f"h.{layer}.experts.{expert}.up")
    assert "h.{0-1}.experts.{0-2}.up" in table(inspect(write(tmp_path, tensors, {})))


def test_the_table_of_a_fixture():
    text = table(inspect(FIXTURES / "tiny-w8a8-kv-fp8"))
    assert text.startswith("llama, compressed-tensors, 12,128 parameters in 15.6 kB: ")
    line = next(line for line in text.splitlines() if "q_proj" in line)
    assert "int8 channel × int8 token dynamic" in line and "cpu.dot_int8" in line
    assert "config_groups.group_0, target Linear" in line
    assert "why not native:" not in text
    assert "memory: " in text and "32 B of KV cache a token" in text


def test_the_table_says_why_something_is_slow(tmp_path):
    text = table(inspect(write(tmp_path, llama_tensors(q_proj=dense(64, 64, np.float64)), llama())))
    assert "reference.linear" in next(line for line in text.splitlines() if "q_proj" in line)
    assert "why not native:" in text and "reference: float64: " in text
    assert "cpu.dot_bf16: floats of 16 or 32 bits" in text


def test_the_table_shows_what_is_wrong(tmp_path):
    stored = integers(64, 64, 4, 32)
    wrong = block(stored.weights | {"num_bits": 8}, ["re:.*q_proj"], odd=1)
    tensors = llama_tensors(q_proj=stored) | {f"stray{number}": np.ones(1) for number in range(30)}
    text = table(inspect(write(tmp_path, tensors, llama(wrong))))
    for title in ("errors:", "warnings:", "tensors that belong to no module:", "config keys that nothing reads:"):
        assert title in text
    assert "tensors-disagree" in text and "quantization_config.odd" in text
    assert "… and 10 more" in text


def test_markup_in_names_is_text(tmp_path):
    text = table(inspect(write(tmp_path, dense(8, 8).under("a.[red]b[/red]"), {})))
    assert "a.[red]b[/red]" in text


def test_names_do_nothing_to_the_terminal(tmp_path):
    text = table(inspect(write(tmp_path, dense(8, 8).under("a.\x1b[31mb\x07\nc"), {"model_type": "\x9b2J"})))
    assert r"a.\x1b[31mb\x07\nc" in text and r"\x9b2J" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_a_failed_plan_has_a_table_too():
    text = table(failed(CheckpointError("json-invalid", "not valid JSON", module="config.json")))
    assert "json-invalid: config.json: not valid JSON" in text


def test_summary(tmp_path):
    tensors = {"a.weight": Raw("BF16", (0, 8)), "b.weight": Raw("BF16", (4, 8), bytes(64))}
    assert summary(inspect(write(tmp_path, tensors, {}))) == (
        "unknown family, not quantized, 32 parameters in 64 B: 2 x bfloat16"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (15556, "15.6 kB"),
        (999_999, "1 MB"),
        (1_027_217_152, "1.03 GB"),
        (5e12, "5e+03 GB"),
    ],
)
def test_bytes_for_people(count, text):
    assert gigabytes(count) == text


def test_failures_begin_with_the_word():
    error = CheckpointError("json-invalid", "not valid JSON", module="config.json", hint="fetch it again")
    assert failure_text(error) == "error: config.json: not valid JSON\n\nhint: fetch it again"


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_object(name):
    planned = inspect(FIXTURES / name)
    stream = io.StringIO()
    write_json(planned, stream)
    assert json.loads(stream.getvalue()) == to_json(planned)
    assert stream.getvalue() == json.dumps(to_json(planned), ensure_ascii=False) + "\n"
