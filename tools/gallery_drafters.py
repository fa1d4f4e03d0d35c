"""Drafters and their targets for docs/gallery.md: small folders, built where they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from drafters import NORMS, Build
from make import BF16, HEAD, Array, Stored, block, dense, integers, llama, llama_tensors, write

INT4 = integers(32, 64, 4, 32)  # a head of 32 rows
TABLE = dense(*HEAD, seed=1)  # the target's embedding
OTHER_TABLE = dense(*HEAD, seed=99)


def drafter(head: Stored | None = INT4, embedding: Stored | None = None, hidden: int = 64) -> Build:
    """An Eagle3 drafter: one layer, a quantized projection of three states of 64 numbers; its head has as many rows as
    the target's or 32, or isn't stored.
    """

    def build(folder: Path) -> object:
        shapes = {"self_attn.q": (hidden, 2 * hidden), "self_attn.k": (32, 2 * hidden), "self_attn.v": (32, 2 * hidden)}
        shapes |= {"self_attn.o": (hidden, hidden), "mlp.gate": (96, hidden), "mlp.up": (96, hidden)}
        shapes |= {"mlp.down": (hidden, 96)}
        tensors: dict[str, Array] = integers(hidden, 192, 4, 32).under("fc")
        for seed, (name, shape) in enumerate(shapes.items()):
            tensors |= dense(*shape, seed=seed).under(f"midlayer.{name}_proj")
        tensors |= {f"{name}.weight": np.ones(hidden, BF16) for name in NORMS}
        quantized = ["re:fc", *(["re:lm_head"] if head is not None and head.weights else [])]
        config = llama(block(INT4.weights, quantized), architectures=["LlamaForCausalLMEagle3"])
        config |= {"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}  # the target has one layer
        config |= {"hidden_size": hidden, "target_hidden_size": 64, "num_attention_heads": hidden // 32}
        if embedding is not None:
            tensors |= embedding.under("embed_tokens")
        if head is not None:
            tensors |= head.under("lm_head")
            if len(head.values) < HEAD[0]:
                tensors |= {"d2t": np.arange(32) // 4, "t2d": np.arange(40) % 5 < 4}
                config["draft_vocab_size"] = 32
        return write(folder, tensors, config)

    return build


def target(head: Stored | None = None, **modules: Stored) -> Build:
    """The small Llama with such a head (None: bfloat16), and modules by their last names."""
    stored = modules | ({} if head is None else {"lm_head": head})

    def build(folder: Path) -> object:
        weights = next((module.weights for module in stored.values()), None)
        config = llama(None if weights is None else block(weights, [f"re:.*{name}" for name in stored]))
        return write(folder, llama_tensors(**stored), config)

    return build
