"""Makes checkpoints with random weights, in the files of llm-compressor: to measure speed, where values don't matter.

    python tools/make_synthetic.py --out DIR                        every scheme, in the shape of Llama-3.2-1B
    python tools/make_synthetic.py --out DIR w4a16 w8a8 --head      two schemes, lm_head quantized like the rest
    python tools/make_synthetic.py --out DIR w4a16 --head --layers 24 --hidden 1536 --heads 24 --kv-heads 4 \
        --intermediate 512 --experts 48 --experts-per-token 8 --vocab 32000
                                                                    a Qwen3-MoE of 2.9 B parameters, 0.7 B at work
    python tools/make_synthetic.py --out DIR w8a8 --drafter         an Eagle3 drafter for the Llama, head and all
    python tools/make_synthetic.py --out DIR bf16 --layers 2 --hidden 256 --intermediate 512 --vocab 1024

Each is a complete folder DIR/<scheme>[-head or -drafter], with a byte-level tokenizer of as many tokens as the head has
rows. Codes are drawn as if normal weights had been quantized; nothing is ever quantized, so a checkpoint takes seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_schemes import BF16, SCHEMES, STD, Array, Scheme, bfloat16_of
from synthetic_tokenizer import begin_id, end_id, write_tokenizer

SHARD = 400_000_000  # parameters of a file
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Shape:
    """Of a Llama; the defaults are Llama-3.2-1B's, with a head of its own. Where there are experts, each as wide as
    `intermediate`, of a Qwen3-MoE.
    """

    layers: int = 16
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    intermediate: int = 8192
    vocab: int = 128_256
    context: int = 131_072
    experts: int = 0
    experts_per_token: int = 8

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name, N, K) of a layer's projections."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "self_attn.q_proj", queries, self.hidden
        yield "self_attn.k_proj", keys, self.hidden
        yield "self_attn.v_proj", keys, self.hidden
        yield "self_attn.o_proj", self.hidden, queries
        for mlp in [f"mlp.experts.{number}" for number in range(self.experts)] or ["mlp"]:
            yield f"{mlp}.gate_proj", self.intermediate, self.hidden
            yield f"{mlp}.up_proj", self.intermediate, self.hidden
            yield f"{mlp}.down_proj", self.hidden, self.intermediate

    def modules(self, head: bool) -> Iterator[tuple[str, int, int | None, bool]]:
        """(name, N, K or None for a norm, quantized), in the order of the forward pass."""
        yield EMBEDDING, self.vocab, self.hidden, False
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{name}.{norm}", self.hidden, None, False
            if self.experts:
                for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                    yield f"{name}.{norm}", self.head_dim, None, False
                yield f"{name}.mlp.gate", self.experts, self.hidden, False
            for linear, N, K in self.linears():
                yield f"{name}.{linear}", N, K, True
        yield "model.norm", self.hidden, None, False
        yield "lm_head", self.vocab, self.hidden, head

    def beside(self) -> dict[str, Array]:
        """Tensors that belong to no module."""
        return {}


@dataclass(frozen=True)
class DrafterShape(Shape):
    """An Eagle3 drafter of one layer for a target of this shape."""

    draft_vocab: int = 32_000

    def modules(self, head: bool) -> Iterator[tuple[str, int, int | None, bool]]:
        yield "fc", self.hidden, 3 * self.hidden, True
        for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            yield f"midlayer.{norm}", self.hidden, None, False
        for linear, N, K in self.linears():
            inputs = 2 * self.hidden if linear.endswith(("q_proj", "k_proj", "v_proj")) else K
            yield f"midlayer.{linear}", N, inputs, True
        yield "norm", self.hidden, None, False
        yield "lm_head", self.draft_vocab, self.hidden, head

    def beside(self) -> dict[str, Array]:
        return {"d2t": np.arange(self.draft_vocab) * (self.vocab // self.draft_vocab - 1)}


def make(folder: Path, scheme: str, shape: Shape, head: bool = False, seed: int = 0) -> None:
    """Write one checkpoint; a folder that is there is replaced. Raises ValueError for shapes the scheme can't have."""
    chosen = SCHEMES[scheme]
    modules = list(shape.modules(head))
    for _, N, K, quantized in modules:
        if quantized and K is not None and K % chosen.columns:
            raise ValueError(f"{scheme} needs rows of a multiple of {chosen.columns}, not [{N}, {K}]")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_weights(folder, chosen, modules, shape.beside(), np.random.Generator(np.random.SFC64(seed)))
    (folder / "config.json").write_text(_json(config(chosen, shape, head)))
    (folder / "generation_config.json").write_text(
        _json({"bos_token_id": begin_id(shape.vocab), "eos_token_id": end_id(shape.vocab)})
    )
    write_tokenizer(folder, shape.vocab, shape.context)


def write_weights(
    folder: Path,
    scheme: Scheme,
    modules: list[tuple[str, int, int | None, bool]],
    beside: Mapping[str, Array],
    random: np.random.Generator,
) -> None:
    shards: list[list[tuple[str, int, int | None, bool]]] = [[]]
    size = 0
    for module in modules:
        count = module[1] * (module[2] or 1)
        if shards[-1] and size + count > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(module)
        size += count
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        tensors = dict(beside) if number == 1 else {}
        for name, N, K, quantized in shard:
            made = SCHEMES[BF16] if not quantized else scheme
            arrays = norm(random, N) if K is None else made.tensors(random, N, K)
            tensors |= {f"{name}.{suffix}": array for suffix, array in arrays.items()}
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(array.nbytes for array in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(_json(index))


def norm(random: np.random.Generator, count: int) -> dict[str, Array]:
    return {"weight": bfloat16_of(1 + 0.1 * random.standard_normal(count))}


# The library's writer takes bfloat16, FP8 and FP4 from NumPy only through interfaces that differ between its versions.
DTYPES = {
    "bfloat16": "BF16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}


def write_file(path: Path, tensors: Mapping[str, Array]) -> None:
    """A safetensors file: the header's length, the header, the tensors, the widest dtypes first, without holes."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in ordered:
        end = position + array.nbytes
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            file.write(array.view(np.uint8).data)


def config(scheme: Scheme, shape: Shape, head: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": begin_id(shape.vocab),
        "dtype": "bfloat16",
        "eos_token_id": end_id(shape.vocab),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if shape.experts:
        del values["mlp_bias"], values["pretraining_tp"]
        values |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
        }
    if isinstance(shape, DrafterShape):
        values |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": shape.draft_vocab}
        values["num_hidden_layers"] = 1
    if scheme.weights is not None:
        values["quantization_config"] = {
            "config_groups": {
                "group_0": {
                    "format": scheme.format,
                    "input_activations": scheme.activations,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": scheme.weights,
                }
            },
            "format": scheme.format,
            "global_compression_ratio": None,
            "ignore": [
                name for name, _, K, quantized in shape.modules(head) if K and not quantized and name != EMBEDDING
            ],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": "0.19.0",
        }
    return dict(sorted(values.items()))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help=f"of {', '.join(SCHEMES)} (all)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make them in")
    parser.add_argument("--head", action="store_true", help="quantize lm_head too")
    parser.add_argument("--drafter", action="store_true", help="make drafters, their lm_head quantized")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    arguments = parser.parse_args()
    unknown = set(arguments.schemes) - set(SCHEMES)
    if unknown:
        parser.error(f"no such scheme: {', '.join(sorted(unknown))}")
    kind = DrafterShape if arguments.drafter else Shape
    shape = kind(**{name: getattr(arguments, name) for name in asdict(Shape())})
    for scheme in arguments.schemes or SCHEMES:
        head = (arguments.head or arguments.drafter) and SCHEMES[scheme].weights is not None
        folder = arguments.out / (f"{scheme}-drafter" if arguments.drafter else f"{scheme}-head" if head else scheme)
        make(folder, scheme, shape, head, arguments.seed)
        print(folder)


if __name__ == "__main__":
    main()
