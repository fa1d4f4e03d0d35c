"""Drafters from files: what they guess, beside an implementation of its own; what they share with a target, and what
doesn't fit.

The expected logits are float64, of weights as compressed-tensors reads them back, rounded to bfloat16. Quantized inputs
are rounded to 8 bits in fewbits alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drafters import DRAFTERS, NAMES, TARGET, Tensors, changed, draft_of, drafted, expected, watched
from safetensors.numpy import load_file

from fewbits.draft_plan import plan_draft
from fewbits.engine.kvcache import KVCache, Part
from fewbits.errors import FewbitsError, PlanError
from fewbits.kernels.ops import Ops
from fewbits.kernels.reference.ops import ReferenceOps
from fewbits.load import Loaded, inspect, load
from fewbits.load_drafter import LoadedDrafter, load_drafter
from fewbits.models.eagle3 import LayerIds

SHARP = 1e-5  # float32 between operations
ROUNDED = 2.0**-6  # a few roundings to bfloat16, of weights or inputs
# Inputs of int8 are off by up to 2^-8 of their largest, those of fp8 by 2^-4 of themselves; the eight products that lie
# one behind the other in a draft add some of that up. Measured: 0.022 and 0.063.
QUANTIZED = {"int": 2.0**-5, "float": 2.0**-3}


@pytest.fixture(scope="module", params=["reference", "native"])
def target(request: pytest.FixtureRequest) -> Loaded:
    ops: Ops | None = ReferenceOps() if request.param == "reference" else None
    return load(TARGET, allow_reference=True, ops=ops)


@pytest.fixture(scope="module")
def native() -> Loaded:
    return load(TARGET)


def guesses(folder: Path, target: Loaded, known: Tensors) -> tuple[LoadedDrafter, np.ndarray, np.ndarray, list[int]]:
    """The drafter; logits of the given rows, and of the two steps behind them, fed with the drafter's own states; and
    the tokens that these are fed with.
    """
    target, logits = watched(target)
    loaded = load_drafter(folder, target, allow_reference=True)
    drafted(loaded, known, rows=len(known["tokens"]))
    tokens, _ = drafted(loaded, known, count=3)
    rows, last, *further = logits
    assert np.array_equal(rows[-1:], last)
    return loaded, rows, np.concatenate(further), tokens[:2]


def bound(loaded: LoadedDrafter, reference: bool) -> float:
    acts = {row.spec.act.kind for row in loaded.planned.plan.rows if row.spec.act is not None}
    if acts:
        return max(QUANTIZED[kind] for kind in acts)
    quantized = any(row.spec.weight.quantized for row in loaded.planned.plan.rows)
    return SHARP if reference and not quantized else ROUNDED


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_what_it_guesses_is_what_the_definition_says(name: str, target: Loaded) -> None:
    known = expected(name)
    loaded, rows, further, following = guesses(DRAFTERS / name, target, known)
    allowed = bound(loaded, target.ops.name == "reference")
    assert distance(rows, known["logits"]) < allowed
    assert following == known["next"].tolist()
    assert distance(further, known["further"]) < 2 * allowed  # which read what the rows before gave
    assert loaded.planned.boundaries == (0, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_native_guesses_are_those_of_the_reference(name: str, native: Loaded) -> None:
    reference = load(TARGET, ops=ReferenceOps())
    known = expected(name)
    (_, *ours, _), (_, *theirs, _) = (guesses(DRAFTERS / name, target, known) for target in (native, reference))
    assert all(distance(our, their) < ROUNDED for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_in_one_call_is_that_of_its_operations(name: str, native: Loaded) -> None:
    known = expected(name)
    for how in ({"rows": len(known["tokens"])}, {"count": 4}):
        in_one, one_by_one = (
            drafted(load_drafter(DRAFTERS / name, target, allow_reference=True), known, **how)
            for target in (native, watched(native)[0])
        )
        assert in_one[0] == one_by_one[0] and np.array_equal(in_one[1], one_by_one[1])


def with_layers(folder: Path, count: int) -> Path:
    """A drafter whose further layers are its first one's halves that read the state."""

    def add(tensors: Tensors) -> None:
        hidden = len(tensors["norm.weight"])
        first = {name: tensor for name, tensor in tensors.items() if name.startswith("midlayer.")}
        for layer in range(1, count):
            for name, tensor in first.items():
                narrow = (
                    tensor[:, hidden:].copy()
                    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
                    else tensor
                )
                if "hidden_norm" not in name:
                    tensors[name.replace("midlayer", f"layers.{layer}")] = narrow

    return changed(folder, change=add, num_hidden_layers=count)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_rows_that_only_catch_up_leave_keys_and_values_of_every_layer(
    layers: int, native: Loaded, tmp_path: Path
) -> None:
    """A draft is the same whether rows were read with it or before, and as the reference says; for several layers too,
    of which all but the last compute every row.
    """
    folder, known = with_layers(tmp_path / "drafter", layers), expected("bf16")
    reference = load(TARGET, ops=ReferenceOps())
    results = []
    for target in (native, watched(native)[0], reference):
        loaded = load_drafter(folder, target, allow_reference=True)
        whole = draft_of(loaded, known, [1, 1, 1])
        states = [np.ascontiguousarray(part) for part in np.split(known["states"], 3, axis=1)]
        tokens = known["tokens"].tolist()
        cache = KVCache([replace(layer, dtype="f32") for layer in loaded.cache_layers], max_pages=8)
        for begin, end, rows in ((0, 2, [0]), (2, len(tokens), [1, 1, 1])):
            part = Part(0, tokens[begin:end], rows[0], ahead=len(rows) - 1)
            draft = loaded.drafter.draft(cache.batch([part]), [state[begin:end] for state in states], rows, cache)
        np.testing.assert_array_equal(draft.tokens, whole.tokens)
        np.testing.assert_array_equal(draft.chances, whole.chances)
        results.append(whole)
    np.testing.assert_array_equal(results[0].tokens, results[1].tokens)
    np.testing.assert_array_equal(results[0].states[:1], results[1].states[:1])
    assert results[0].tokens[0] == results[2].tokens[0]  # the rounding of inputs adds up in those behind it
    np.testing.assert_allclose(results[0].chances[0], results[2].chances[0], rtol=0.1)


@pytest.mark.parametrize("name", ["bf16", "w4a16-asym-head"])
def test_a_draft_ends_where_the_drafter_is_not_sure_enough(name: str, native: Loaded) -> None:
    """Chances are those of softmax, of a token and all before it; a draft ends behind the first that is below."""
    known = expected(name)
    watching, logits = watched(native)
    one_by_one = load_drafter(DRAFTERS / name, watching)
    whole = draft_of(one_by_one, known, [1] * 5)
    shares = [1 / np.exp(row.astype(np.float64) - row.max()).sum() for (row,) in logits]
    np.testing.assert_allclose(whole.chances[:, 0], np.cumprod(shares), rtol=1e-5)
    for loaded in (one_by_one, load_drafter(DRAFTERS / name, native)):
        for place, chance in enumerate(whole.chances[:, 0].tolist()):
            for least, places in ((1.001 * chance, place + 1), (0.999 * chance, min(place + 2, 5))):
                draft = draft_of(loaded, known, [1] * 5, least)
                assert len(draft.tokens) == len(draft.chances) == places
                np.testing.assert_array_equal(draft.tokens, whole.tokens[:places])
                np.testing.assert_allclose(draft.chances, whole.chances[:places], rtol=1e-5)


def test_the_drafters_head_is_quantized_by_its_own_config_and_the_targets_by_its_own(native: Loaded) -> None:
    """Engines built the drafter's head without its config, or with the target's."""
    loaded = load_drafter(DRAFTERS / "int8-head-only", native)
    specs = {row.name: str(row.spec) for row in loaded.planned.plan.rows if row.runs}
    assert specs["lm_head"] == "int8 channel × a16"
    assert specs["fc"] == specs["midlayer.mlp.down_proj"] == "bfloat16"
    assert str(next(row.spec for row in native.plan.rows if row.name == "lm_head")) == "uint4 g32 asym × a16"


def test_a_drafters_cache_is_kept_as_its_own_config_says(native: Loaded, tmp_path: Path) -> None:
    """By its own scales, under its own names; the target's has nothing to do with it."""
    scales = {"k_scale": 0.02, "v_scale": 0.01}
    block = json.loads((DRAFTERS / "w8a8-head" / "config.json").read_text())["quantization_config"]
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    block |= {"kv_cache_scheme": fp8}

    def scaled(tensors: Tensors) -> None:
        tensors |= {f"midlayer.self_attn.{name}": np.full(1, value, np.float32) for name, value in scales.items()}

    folder = changed(tmp_path / "scaled", "w8a8-head", scaled, quantization_config=block)
    loaded = load_drafter(folder, native)
    [layer] = loaded.cache_layers
    assert layer.dtype == "fp8"
    np.testing.assert_allclose([layer.k_scale, layer.v_scale], [[0.02, 0.02], [0.01, 0.01]])
    assert not loaded.planned.plan.warnings and not loaded.planned.plan.leftover_tensors
    known = expected("w8a8-head")
    plain = first_logits(DRAFTERS / "w8a8-head", native, known)
    found = first_logits(folder, native, known)
    assert 0 < np.linalg.norm(found - plain) < QUANTIZED["float"] * np.linalg.norm(plain)

    missing = inspect(changed(tmp_path / "missing", "w8a8-head", quantization_config=block))
    [warning] = [one for one in missing.warnings if one.code == "kv-scales-missing"]
    assert warning.module == "midlayer.self_attn"


def first_logits(folder: Path, target: Loaded, known: Tensors) -> np.ndarray:
    """In the cache as the drafter's config says it is kept."""
    target, logits = watched(target)
    drafted(load_drafter(folder, target), known, rows=len(known["tokens"]), dtype=None)
    return logits[0]


def test_a_head_may_stay_as_it_is_while_everything_else_is_quantized(native: Loaded) -> None:
    loaded = load_drafter(DRAFTERS / "fp8-bf16-head", native, allow_reference=True)
    specs = {row.name: str(row.spec) for row in loaded.planned.plan.rows if row.runs}
    assert specs["lm_head"] == "bfloat16" and specs["fc"] == "fp8 channel × fp8 token dynamic"


# What is shared


def test_what_is_not_stored_is_the_targets_module_and_said_to_be(native: Loaded, tmp_path: Path) -> None:
    def without_head(tensors: Tensors) -> None:
        for name in ("lm_head.weight", "d2t", "t2d"):
            del tensors[name]

    folder = changed(tmp_path / "drafter", change=without_head, draft_vocab_size=None)
    target, seen = watched(native)
    loaded = load_drafter(folder, target)
    assert loaded.planned.of_target == {"embedding": "it isn't stored", "head": "it isn't stored"}
    rows = {row.name: row for row in loaded.planned.plan.rows}
    for name in ("embed_tokens", "lm_head"):
        assert (rows[name].executed_as, rows[name].tensors) == ("not_run", ())
        assert rows[name].reason == "the target's takes its place"
    # The target's head is packed and has no `.weight`; what comes out is what its kernel makes of the last state.
    [token], states = drafted(loaded, expected("bf16"))
    kernel, packed = native.params["lm_head"]
    norm = native.ops.norm(native.ops.vector(load_file(folder / "model.safetensors")["norm.weight"]), 1e-5, 0.0)
    (logits,) = kernel.bind([packed])(norm(states))
    assert np.array_equal(seen[0], logits) and logits.shape == (1, 96) and token == logits.argmax()


def test_a_missing_head_of_a_reduced_vocabulary_is_the_targets_at_its_tokens(native: Loaded, tmp_path: Path) -> None:
    def without_head(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    target, seen = watched(native)
    folder, known = changed(tmp_path / "drafter", change=without_head), expected("bf16")
    tokens, _ = drafted(load_drafter(folder, target), known, rows=len(known["tokens"]))
    offsets = load_file(folder / "model.safetensors")["d2t"]
    ids = np.arange(64) + offsets
    assert seen[0].shape == (len(tokens), 96)
    assert tokens == ids[seen[0][:, ids].argmax(axis=1)].tolist()
    assert drafted(load_drafter(folder, native), known, rows=len(tokens))[0] == tokens


def test_an_equal_embedding_is_shared_and_another_kept(native: Loaded, tmp_path: Path) -> None:
    table = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"]

    def equal(tensors: Tensors) -> None:
        tensors["embed_tokens.weight"] = table.copy()

    def near(tensors: Tensors) -> None:
        tensors["embed_tokens.weight"] = table * np.float32(1.01)

    def unlike(tensors: Tensors) -> None:
        tensors["embed_tokens.weight"] = np.random.default_rng(0).standard_normal(table.shape).astype(np.float32)

    shared = load_drafter(changed(tmp_path / "equal", change=equal), native).planned
    assert shared.of_target == {"embedding": "its own is equal to it"}
    row = next(row for row in shared.plan.rows if row.name == "embed_tokens")
    assert (row.executed_as, row.tensors) == ("not_run", ("embed_tokens.weight",))
    kept = load_drafter(changed(tmp_path / "near", change=near), native)
    assert kept.planned.of_target == {} and kept.notices == []
    other = load_drafter(changed(tmp_path / "unlike", change=unlike), native)
    assert other.planned.of_target == {} and [notice.code for notice in other.notices] == ["draft-embedding"]


def test_tables_of_folders_without_data_are_not_compared(native: Loaded, tmp_path: Path) -> None:
    shutil.copytree(DRAFTERS / "bf16", tmp_path / "drafter")
    file = tmp_path / "drafter" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    found = plan_draft(tmp_path / "drafter", native.plan)
    assert found.plan.errors == [] and found.boundaries == (0, 1, 2)
    assert found.of_target == {"embedding": "it isn't stored"}


def test_a_head_of_another_width_is_never_shared(native: Loaded) -> None:
    loaded = load_drafter(DRAFTERS / "bf16", native)
    assert "head" not in loaded.planned.of_target and loaded.drafter.config.draft_vocab == 64


# What doesn't fit


@pytest.mark.parametrize(
    ("config", "code", "part"),
    [
        ({"vocab_size": 97}, "draft-mismatch", "vocab_size is 97"),
        ({"target_hidden_size": 32}, "draft-mismatch", "target_hidden_size is 32"),
        ({"draft_vocab_size": 63}, "shape-mismatch", "the config makes it [63, 64]"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}, "draft-mismatch", "behind 4 layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, "draft-mismatch", "takes in 3 states"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "config-unsupported", "use_aux_hidden_state"),
        ({"speculators_model_type": "dflash"}, "config-unsupported", "dflash"),
        ({"speculators_model_type": "peagle"}, "config-unsupported", "peagle"),
        ({"norm_before_fc": True, "fc_norm": True}, "config-unsupported", "exclude each other"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(
    config: dict[str, object], code: str, part: str, native: Loaded, tmp_path: Path
) -> None:
    with pytest.raises(FewbitsError) as caught:
        load_drafter(changed(tmp_path / "drafter", **config), native)
    assert caught.value.code == code and part in str(caught.value)


def test_a_reduced_head_without_d2t_is_an_error(native: Loaded, tmp_path: Path) -> None:
    """An engine takes it for zeros, which is the wrong token for nearly every row."""

    def change(tensors: Tensors) -> None:
        del tensors["d2t"]

    with pytest.raises(PlanError) as caught:
        load_drafter(changed(tmp_path / "drafter", change=change), native)
    assert caught.value.code == "module-missing" and caught.value.module == "d2t"


@pytest.mark.parametrize("kind", ["absolute", "negative", "beyond"])
def test_offsets_that_make_no_tokens_are_an_error(kind: str, native: Loaded, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        offsets = tensors["d2t"]
        if kind == "absolute":
            tensors["d2t"] = offsets + np.arange(len(offsets))
        elif kind == "negative":
            tensors["d2t"][0] = -1
        else:
            tensors["d2t"][-1] = 90

    with pytest.raises(PlanError) as caught:
        load_drafter(changed(tmp_path / "drafter", change=change), native)
    assert caught.value.code == "draft-vocabulary"


def test_a_model_is_no_drafter_and_a_drafter_no_model(native: Loaded) -> None:
    with pytest.raises(PlanError) as caught:
        load_drafter(TARGET, native)
    assert caught.value.code == "draft-not-a-drafter"
    with pytest.raises(PlanError) as caught:
        load(DRAFTERS / "bf16")
    assert caught.value.code == "draft-alone"


def test_speculators_must_say_which_residual(native: Loaded, tmp_path: Path) -> None:
    folder = changed(tmp_path / "drafter", name="speculators-llama", norm_before_residual=None)
    with pytest.raises(FewbitsError) as caught:
        load_drafter(folder, native)
    assert "norm_before_residual is missing" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_in_the_plan(name: str) -> None:
    plan = inspect(DRAFTERS / name)
    claimed = [tensor for row in plan.rows for tensor in row.tensors] + plan.leftover_tensors
    assert plan.checkpoint is not None and sorted(claimed) == sorted(plan.checkpoint.tensors)
    assert plan.leftover_tensors == [] and plan.errors == [] and plan.config_keys == []


# Which states it reads

DEFAULT = (2, 12, 21)  # of 24 layers


@pytest.mark.parametrize(
    ("given", "speculators", "in_eagle_config", "boundaries"),
    [
        (None, False, False, DEFAULT),
        ((2, 12, 21), False, True, DEFAULT),
        ((1, 11, 20), False, True, DEFAULT),
        ((1, 11, 20), False, False, DEFAULT),
        ((1, 11, 20), True, False, (1, 11, 20)),  # speculators counts boundaries, whatever they look like
        ((8, 16, 24), False, True, (8, 16, 24)),  # 24 is behind all layers: no layer has that number
        ((3, 11, 22), False, True, (4, 12, 23)),
        ((3, 11, 22), False, False, (3, 11, 22)),
    ],
)
def test_numbers_of_layers_and_boundaries_are_told_apart(
    given: tuple[int, ...] | None, speculators: bool, in_eagle_config: bool, boundaries: tuple[int, ...]
) -> None:
    found, why = LayerIds(given, speculators, in_eagle_config).boundaries(24, 3)
    assert found == boundaries and why


def test_boundaries_may_be_asked_for(native: Loaded) -> None:
    loaded = load_drafter(DRAFTERS / "bf16", native, boundaries=(1, 1, 2))
    assert loaded.planned.boundaries == (1, 1, 2) and loaded.planned.why == "as asked"
    with pytest.raises(PlanError, match="takes in 3 states, not 2"):
        load_drafter(DRAFTERS / "bf16", native, boundaries=(1, 2))
    with pytest.raises(PlanError, match="behind 3 layers, of which the target has 2"):
        load_drafter(DRAFTERS / "bf16", native, boundaries=(1, 2, 3))
