"""The cases of docs/gallery.md: a folder each, and who met it. The numbers of threads are those of the trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple

import numpy as np
from drafters import in_one_direction
from gallery_drafters import INT4, OTHER_TABLE, TABLE, drafter, target
from make import HEAD, Array, Stored, block, dense, fp8, integers, llama, llama_tensors, nvfp4, write

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


class Case(NamedTuple):
    """`seen`: what people met; `engines`: what the big engines do; `modules`: words of the rows that matter;
    `target`: of a drafter, what it runs beside; `tokens`: how many are asked for there.
    """

    title: str
    seen: str
    engines: str
    build: Callable[[Path], object]
    modules: tuple[str, ...] = ()
    command: str = "inspect"
    note: str = ""
    target: Callable[[Path], object] | None = None
    tokens: int = 8


def int4(rows: int, columns: int, **options: Any) -> Stored:
    return integers(rows, columns, 4, 32, **options)


def model(stored: dict[str, Stored], quantization: dict[str, Any]) -> Callable[[Path], object]:
    """The small Llama with modules stored so, by their last names."""
    return lambda folder: write(folder, llama_tensors(**stored), llama(quantization))


W4 = int4(64, 64).weights
LINEARS = {"q_proj": int4(64, 64, seed=1), "o_proj": int4(64, 64, seed=2)}
OTHERS = ["re:.*[kv]_proj", "re:.*mlp", "lm_head"]


def experts(folder: Path) -> Path:
    """A router and two experts, the first of which stays bfloat16."""
    tensors: dict[str, Array] = dense(2, 64).under(f"{MLP}.gate")
    for name, shape in {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}.items():
        tensors |= dense(*shape).under(f"{MLP}.experts.0.{name}")
        tensors |= int4(*shape, asymmetric=True).under(f"{MLP}.experts.1.{name}")
    names = [f"{MLP}.experts.0.{name}_proj" for name in ("gate", "up", "down")]
    quantization = block(int4(64, 64, asymmetric=True).weights, ignore=[f"{MLP}.gate", *names])
    return write(folder, tensors, {"architectures": ["QwenMoeForCausalLM"], "quantization_config": quantization})


def text_config(folder: Path) -> Path:
    inner = llama(block(W4, ignore=OTHERS)) | {"model_type": "llama"}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": inner}
    return write(folder, llama_tensors(**LINEARS), config)


def unequal_global_scales(folder: Path) -> Path:
    """One layer's divisors as auto-round#2380 reports them."""
    divisors = {"q_proj": 12343, "k_proj": 5334, "v_proj": 8001}
    stored = {name: nvfp4(64 if name == "q_proj" else 32, 64) for name in divisors}
    for name, divisor in divisors.items():
        stored[name].tensors["weight_global_scale"] = np.array([divisor], np.float32)
    return write(folder, llama_tensors(**stored), llama(block(stored["q_proj"].weights, ["re:.*[qkv]_proj"])))


def zero_global_scale(folder: Path) -> Path:
    stored = nvfp4(64, 64)
    stored.tensors["weight_global_scale"] = np.zeros(1, np.float32)
    return write(folder, llama_tensors(q_proj=stored), llama(block(stored.weights, ["re:.*q_proj"])))


def flat_scales(folder: Path) -> Path:
    """A scale a row, stored [N], [N, 1] and [1, N]… by different writers."""
    shapes = {"q_proj": (64,), "k_proj": (32, 1), "v_proj": (32, 1, 1)}
    stored = {}
    for name, shape in shapes.items():
        stored[name] = fp8(shape[0], 64)
        stored[name].tensors["weight_scale"] = stored[name].tensors["weight_scale"].reshape(shape)
    return write(folder, llama_tensors(**stored), llama(block(stored["q_proj"].weights, ["re:.*[qkv]_proj"])))


def twins(folder: Path) -> Path:
    """The same int4 tensors, with and without quantized activations."""
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    groups = {
        "group_0": {"targets": ["re:.*q_proj"], "weights": W4, "input_activations": None},
        "group_1": {"targets": ["re:.*o_proj"], "weights": W4, "input_activations": token},
    }
    return write(folder, llama_tensors(**LINEARS), llama(block(None) | {"config_groups": groups}))


def several_groups(folder: Path) -> Path:
    stored = {"q_proj": fp8(64, 64), "o_proj": int4(64, 64), "lm_head": integers(*HEAD, 8)}
    targets = {"q_proj": "re:.*q_proj", "o_proj": "re:.*o_proj", "lm_head": "lm_head"}
    groups = {
        f"group_{number}": {"targets": [targets[name]], "weights": one.weights, "format": None}
        for number, (name, one) in enumerate(stored.items())
    }
    quantization = block(None) | {"config_groups": groups, "format": "mixed-precision"}
    return write(folder, llama_tensors(**stored), llama(quantization))


def act_order(folder: Path) -> Path:
    stored = int4(64, 64)
    stored.tensors["weight_g_idx"] = np.random.default_rng(0).permutation(np.arange(64, dtype=np.int32) // 32)
    weights = (stored.weights or {}) | {"actorder": "group"}
    return write(folder, llama_tensors(q_proj=stored), llama(block(weights, ["re:.*q_proj"])))


def mtp(folder: Path) -> Path:
    tensors = (
        llama_tensors(**LINEARS) | dense(64, 128).under("mtp.fc") | dense(64, 64).under("mtp.layers.0.self_attn.q_proj")
    )
    return write(folder, tensors, llama(block(W4, ignore=OTHERS)))


def static_without_scale(folder: Path) -> Path:
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return write(
        folder, llama_tensors(q_proj=fp8(64, 64)), llama(block(fp8(64, 64).weights, ["re:.*q_proj"], inputs=inputs))
    )


def weight_scale_lost(folder: Path) -> Path:
    stored = fp8(64, 64)
    tensors = llama_tensors(q_proj=stored)
    del tensors[f"{ATTENTION}.q_proj.weight_scale"]
    return write(folder, tensors, llama(block(stored.weights, ["re:.*q_proj"])))


def tied(folder: Path) -> Path:
    tensors = llama_tensors(lm_head=None) | int4(*HEAD).under("model.embed_tokens")
    del tensors["model.embed_tokens.weight"]
    return write(folder, tensors, llama(block(W4, ["re:.*embed_tokens"]), tie_word_embeddings=True))


FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
QUARK = Path(__file__).resolve().parents[1] / "tests" / "exports" / "quark"


def quark_awq(folder: Path) -> Path:
    """A model as AMD Quark's AWQ mode writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        copyfile(QUARK / "custom-awq-symmetric" / name, folder / name)
    return folder


def quark_step(folder: Path) -> Path:
    """A layer as AMD Quark's exporter from file to file writes it, of a family without a name: there is one layer."""
    exported = QUARK / "files-step"
    folder.mkdir(parents=True, exist_ok=True)
    copyfile(exported / "model.safetensors", folder / "model.safetensors")
    quantization = json.loads((exported / "config.json").read_text())["quantization_config"]
    config = {"architectures": ["StepForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CASES: tuple[Case, ...] = (
    Case(
        "A quantized lm_head taken for an unquantized one",
        """Loading ends with `There is no module or parameter named 'lm_head.weight_packed'` (llmc#1820, vllm#37291),
        or the head's codes are used without their scale and the model repeats itself (sglang#34895).""",
        """The question whether a layer is quantized was put to linear layers, and the head is of another class. Makers
        of checkpoints were told to leave the head alone.""",
        model({"lm_head": int4(*HEAD)}, block(W4, ignore=["re:.*layers"])),
        ("lm_head",),
    ),
    Case(
        "A head that the config ignores and the file holds packed",
        """`lm_head` stands in the ignore list, and its tensors are quantized all the same (vllm#45102, vllm#44081).""",
        "The list wins: a full-precision parameter is made, and the packed tensors don't fit it.",
        model({"lm_head": int4(*HEAD)}, block(W4, ignore=["re:.*layers", "lm_head"])),
        ("lm_head",),
    ),
    Case(
        "A drafter with a quantized head and projection of its own",
        """An Eagle3 drafter's `fc` couldn't be quantized (vllm#28435), nor its head (vllm#37280), which was
        overwritten by the target's (vllm#27732: accepted length 1.32 instead of 2.49).""",
        "Parts of the drafter are built with the target's configuration, or with none.",
        drafter(),
        ("fc", "lm_head", "q_proj", "embed_tokens"),
        note="""A drafter is a checkpoint like any other: its patterns meet its own names, whatever the target is. A
        head of as many rows as the draft vocabulary has tokens is never the target's.""",
        target=target(),
    ),
    Case(
        "A drafter and a target that are quantized differently",
        "The target's scheme was taken for the drafter's, or the other way around (vllm#25883).",
        "One quantization config is handed to both models.",
        drafter(),
        ("lm_head", "fc"),
        target=target(integers(*HEAD, 8, plain=True), q_proj=integers(64, 64, 8, plain=True)),
    ),
    Case(
        "A drafter with a head of its own, beside a target whose head has no `.weight`",
        """Code that compares the two heads, to share one of them, reads `lm_head.weight` of both, and a packed head has
        none: `AttributeError`.""",
        "Whether heads are equal is asked of tensors with a name, not of modules.",
        drafter(dense(*HEAD, seed=5)),
        ("lm_head",),
        target=target(int4(*HEAD)),
    ),
    Case(
        "A drafter without a head, beside a target whose head is packed",
        """What shares a head reads `lm_head.weight`, which a packed one doesn't have: `AttributeError` (sglang), or the
        comparison of two heads fails where one has no `.weight` (vllm).""",
        "Tensors are shared, by name, where a module is meant.",
        drafter(None),
        ("fc", "lm_head", "embed_tokens"),
        note="The drafter calls the target's modules, in whatever way these are stored.",
        target=target(int4(*HEAD)),
    ),
    Case(
        "A drafter without an embedding",
        "Tables are left out of the file, as they are the target's, and the loader misses them.",
        "What is shared is set by a flag of the config or the name of a class, and the file says otherwise.",
        drafter(),
        ("embed_tokens",),
        target=target(),
    ),
    Case(
        "A drafter whose tables are equal to the target's",
        "A drafter's file repeats the embedding and the head of its target, and both are held twice.",
        "Sharing is decided for a class of drafters, not by what the file holds.",
        drafter(dense(*HEAD, seed=17), TABLE),
        ("embed_tokens", "lm_head"),
        target=target(),
    ),
    Case(
        "A drafter with another embedding than the target's",
        """The embedding was trained with the drafter, and the target's is put in its place; or it was never filled, and
        nothing says so.""",
        "The target's embedding is taken whenever shapes agree.",
        drafter(INT4, OTHER_TABLE),
        ("embed_tokens",),
        command="run",
        target=target(),
    ),
    Case(
        "A drafter narrower than its target, and without a head",
        "A head of another width than the drafter's states is taken for it, and ends in an error of shapes.",
        "A missing head is the target's, whatever its width.",
        drafter(None, dense(40, 32), hidden=32),
        ("fc", "lm_head", "embed_tokens"),
        target=target(),
    ),
    Case(
        "A drafter that reads other layers than it was trained on",
        """Lists of layers count from the embedding, from the first layer or from its output; one off, a drafter loads,
        runs, and guesses nearly nothing (vllm#43671).""",
        "The list is read one way, and what was accepted is in nobody's output.",
        in_one_direction((1, 1, 0))[1],
        ("fc",),
        note="With the layers that it was trained on, 0, 1 and 1, all its guesses are accepted.",
        target=in_one_direction()[0],
        tokens=40,
        command="run",
    ),
    Case(
        "A scale a row, stored [N] where a kernel wants [N, 1]",
        """Writers store per-channel scales as `[N]`, `[N, 1]` or with more axes of one. Where a kernel takes the shape
        for granted, the output is garbage and nothing complains.""",
        "Each loader of each format reshapes, or doesn't, for itself.",
        flat_scales,
        ("q_proj", "k_proj", "v_proj"),
    ),
    Case(
        "An ignore list of fused names",
        """The list names `qkv_proj`, the file holds `q_proj`, `k_proj` and `v_proj`, or the other way around; 0 of
        1550 entries matched in vllm#54547, which ends with `AssertionError: param_data.shape=…`; sglang#36596
        misses prefixed names too.""",
        "Names are rewritten to the engine's own modules with one rule for each model family.",
        model({"o_proj": int4(64, 64)}, block(W4, ignore=[f"{ATTENTION}.qkv_proj", "re:.*mlp", "lm_head"])),
        ("self_attn",),
    ),
    Case(
        "Asymmetric experts",
        """`Only symmetric quantization is supported for MoE`; elsewhere asymmetric files lost their zero points on
        load (transformers#47430), or scored 7.5 points less (vllm#39980).""",
        "The paths for experts were written for symmetric weights.",
        experts,
        ("experts",),
        note="""The first expert is ignored by one entry for each of its projections (lists with such names are what
        sglang#39317 is about) and stays bfloat16. Experts are planned one by one, and run so in the families that
        have them.""",
    ),
    Case(
        "One weight, with and without quantized activations",
        "Weight-only layers ran with quantized activations (vllm#31572), or activations of a W4A8 file stayed float.",
        "There is one class for each pair of format and activation, and a fix of one misses its twin.",
        twins,
        ("q_proj", "o_proj"),
    ),
    Case(
        "NVFP4 shards under different global scales",
        """12343 for q, 5334 for k, 8001 for v of one layer (auto-round#2380); 33 of 36 layers of a model differ
        (vllm#47515).""",
        """The shards become one weight, which keeps the largest of the three; a warning is printed, and the value used
        all the same (vllm#54974).""",
        unequal_global_scales,
        ("q_proj", "k_proj", "v_proj"),
        note="Projections share a call, never a weight: each keeps the scale that is stored with it.",
    ),
    Case(
        "A global scale of zero",
        """A global scale of zero, stored or made up by a loader (a factor of 0.0 in vllm#54189): infinity, NaN, or a
        layer of zeros.""",
        "It is divided by, or multiplied with.",
        zero_global_scale,
        command="run",
    ),
    Case(
        "An ignore list of another tool's patterns",
        """TensorRT-LLM matched the list of a compressed-tensors file as wildcards: every `re:` entry was lost, and
        GSM8K fell to 0 %. A recipe with `model.layers.0.*` matched nothing, and three layers were quantized by
        accident (llmc#2512).""",
        "A pattern that matches nothing is no error anywhere.",
        model({"q_proj": int4(64, 64)}, block(W4, ignore=["*.mlp.*", "re:.*[kvo]_proj", "lm_head"])),
        ("mlp", "q_proj"),
    ),
    Case(
        "A pattern that hits more than was meant",
        """`re:.*mlp.gate` is meant for a router and also matches `mlp.gate_proj`, since patterns aren't anchored at
        their end (sglang#23973 has the same with `gate_up_proj`).""",
        """Part of a fused projection counts as ignored, the rest as quantized: an error, or the first part decides for
        all.""",
        model(
            {"gate_proj": int4(96, 64), "up_proj": int4(96, 64)},
            block(W4, ignore=["re:.*mlp.gate", "re:.*self_attn", f"{MLP}.down_proj", "lm_head"]),
        ),
        ("gate_proj", "up_proj"),
    ),
    Case(
        "Several config groups",
        "`Can't handle multiple config groups for compressed-tensors yet` (mlx-vlm#1706, llmc#2730).",
        "A global format, or the group's key, decides for the whole model.",
        several_groups,
        ("q_proj", "o_proj", "lm_head"),
    ),
    Case(
        "FP8 weights in a file whose status is frozen",
        """`quantization_status: frozen` made a loader take FP8 codes for the weights themselves, without their scale:
        the largest weight is 448 (transformers#47145).""",
        "The status decides whether there are scales to load.",
        model({"q_proj": fp8(64, 64)}, block(fp8(64, 64).weights, ["re:.*q_proj"], quantization_status="frozen")),
        ("q_proj",),
    ),
    Case(
        "A weight's scale that was lost",
        """FP8 codes are valid numbers without their scale; a health check stays green while outputs are wrong
        (vllm#57108).""",
        "The parameter keeps what it was made with: 1.0, 0.0, or whatever was in memory (vllm#54444).",
        weight_scale_lost,
        ("q_proj",),
    ),
    Case(
        "A static input scale that was lost",
        """`input_scale` is dropped by a loader or an exporter, and defaults to 1.0 (sglang#23625, vllm#37462).""",
        "A default, in silence.",
        static_without_scale,
        ("q_proj",),
    ),
    Case(
        "A config that stands in text_config",
        """The block is in `text_config`, or under `compression_config` (llmc#72): the model loads as if nothing were
        quantized.""",
        "One place is looked at, and packed tensors are unexpected ones.",
        text_config,
        ("q_proj", "o_proj"),
    ),
    Case(
        "MTP layers that aren't in the ignore list",
        """Exporters add unquantized MTP layers to a quantized model and forget the list: `size mismatch (128 vs 256)`,
        or no draft is ever accepted (vllm#44087, vllm#49187).""",
        "The list decides; the cure was to edit checkpoints (vllm#38650).",
        mtp,
        ("mtp",),
    ),
    Case(
        "An activation order",
        "Published files with `actorder: group` are refused by libraries that no longer know it (CT#840).",
        "Support is being removed: it costs time, and newer kernels take no index (vllm#48148).",
        act_order,
        ("q_proj",),
    ),
    Case(
        "A quantized cache without its scales",
        "`Using KV cache scaling factor 1.0 for fp8_e4m3`: a warning, and a worse model (vllm#25968).",
        "A default of 1.0.",
        model(LINEARS, block(W4, ignore=OTHERS, kv_cache_scheme=FP8_CACHE)),
        ("q_proj",),
    ),
    Case(
        "A dense sparsity_config",
        "An old block that says that nothing is sparse has the whole checkpoint refused (vllm#51188).",
        "The block's presence is enough.",
        model(LINEARS, block(W4, ignore=OTHERS, sparsity_config={"format": "dense", "targets": [], "ignore": []})),
        ("q_proj", "o_proj"),
    ),
    Case(
        "AMD Quark's INT8, with a shared expert that is excluded in part",
        """Step-3.5-Flash in INT8 by AMD Quark gave garbage and NaN, while the same weights ran in compressed-tensors
        form (vllm#41892). `exclude` names `share_expert.gate_proj` and `self_attn.q_proj`; scales are `[N]`.""",
        """The model class said nothing of what it fuses, so that `gate_up_proj` was in no list: bfloat16 was cast into
        parameters of int8, and their scales were whatever was in memory. Kernels took `[N]` for `[N, 1]`.""",
        quark_step,
        ("q_proj", "k_proj", "share_expert"),
        note="Exported by Quark itself: a layer with the names of Step 3.5, and the config's quantization block alone.",
    ),
    Case(
        "AMD Quark's AWQ mode, symmetric",
        """A file of AWQ's name and config with `zero_point` false gives garbage, or isn't read at all for its
        `model.norm.qweight`: since transformers 5.6 all weights are renamed on saving, norms too.""",
        """It is taken for AutoAWQ's, whose codes are 0 to 15, and multiplied without a zero point. Quark's are two's
        complement, in plain order where `pack_method` says so.""",
        quark_awq,
        ("q_proj", "input_layernorm", "lm_head"),
        note="Exported by Quark itself. The `export` object in the config, which only Quark writes, tells it.",
    ),
    Case(
        "A packed embedding that is the head too",
        """`KeyError: 'embed_tokens.weight_packed'` or `NotImplementedError` from tying what has no `.weight`
        (vllm#45543).""",
        "Tying is the assignment of one attribute, which packed layers don't have.",
        tied,
        ("embed_tokens", "lm_head"),
    ),
)
