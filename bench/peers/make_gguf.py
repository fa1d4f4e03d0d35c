"""Llama-3.2-1B's shapes with random weights as GGUF, for llama.cpp. Needs the packages gguf and numpy.

    python bench/peers/make_gguf.py OUT.gguf q4_0 | q8_0 | bf16

As llama-quantize does, q4_0 has an output matrix of q6_K.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 16, 2048, 32, 8, 64, 8192, 128_256
STD = 0.02


def blocks(random: np.random.Generator, kind: Type, N: int, K: int) -> np.ndarray:
    """Random codes, scales such that the weights' standard deviation is near STD; uint8 [N, bytes of a row]."""
    if kind == Type.F32:
        return np.ones(K, np.float32)
    if kind == Type.BF16:
        values = (STD * random.standard_normal(N * K, np.float32)).view(np.uint32)
        return (values >> 16).astype(np.uint16).view(np.uint8).reshape(N, 2 * K)
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 1 << 64, N * K // columns * size // 8 + 1, np.uint64).view(np.uint8)
    rows = raw[: N * K // columns * size].reshape(-1, size)
    # Where the float16 scale of a block lies, and the standard deviation of uniform codes times other scales.
    at, spread = {Type.Q4_0: (0, 4.6), Type.Q8_0: (0, 74.0), Type.Q6_K: (size - 2, 18.5 * 8)}[kind]
    rows[:, at : at + 2] = np.array([STD / spread], np.float16).view(np.uint8)
    if kind == Type.Q6_K:
        rows[:, 192:208] = 8  # int8 scales of its 16 parts
    return rows.reshape(N, -1)


def main(out: Path, name: str) -> None:
    kind = Type[name.upper()]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(131_072)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type({"q4_0": 2, "q8_0": 7, "bf16": 32}[name])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    tokenizer = out.parent / "bf16" / "tokenizer.json"  # of tools/make_synthetic.py
    model = json.loads(tokenizer.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__) + ["<|begin|>", "<|end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)
    random = np.random.Generator(np.random.SFC64(0))

    def add(tensor: str, N: int, K: int, kind: Type) -> None:
        writer.add_tensor(f"{tensor}.weight", blocks(random, kind, N, K), raw_dtype=kind)

    add("token_embd", VOCAB, HIDDEN, kind)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}.{norm}", 1, HIDDEN, Type.F32)
        add(f"{block}.attn_q", HEADS * HEAD_DIM, HIDDEN, kind)
        add(f"{block}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN, kind)
        add(f"{block}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN, kind)
        add(f"{block}.attn_output", HIDDEN, HEADS * HEAD_DIM, kind)
        add(f"{block}.ffn_gate", WIDTH, HIDDEN, kind)
        add(f"{block}.ffn_up", WIDTH, HIDDEN, kind)
        add(f"{block}.ffn_down", HIDDEN, WIDTH, kind)
    add("output_norm", 1, HIDDEN, Type.F32)
    add("output", VOCAB, HIDDEN, Type.Q6_K if kind == Type.Q4_0 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
