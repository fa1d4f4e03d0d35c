"""Writes tests/exports/drafters: small random Eagle3 drafters, quantized by llm-compressor, each with what it must
guess.

    python tools/make_drafter_fixtures.py

Needs tools/fixtures-requirements.txt. Their target is tests/fixtures/w4a16-asym-g32-head-f32. Beside each folder's
config.json and model.safetensors lies expected.safetensors, computed here in float64 from the weights as
compressed-tensors itself reads them back, with nothing but torch:

    states   float32 [T, states x 64]   made up, in the place of what the target gives
    tokens   int64 [T]                  of rows 0 … T - 1
    logits   float64 [T, V]             of these rows
    next     int64 [2]                  the best guess of the last row, and of the step behind it
    further  float64 [2, V]             the logits of these two steps, which read the drafter's own states

Inputs aren't quantized here; tests allow for it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from fixture_models import generator, random_weight
from make_fixtures import decompress
from quantize_drafter import load_drafter, quantize, save
from quantize_example import integer
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tests" / "exports" / "drafters"
TARGET = ROOT / "tests" / "fixtures" / "w4a16-asym-g32-head-f32"
H, HEADS, KV_HEADS, D, WIDTH, V, DRAFT_V = 64, 4, 2, 16, 96, 96, 64
T = 12
THETA, EPS = 10000.0, 1e-5
BOUNDARIES = [0, 1, 2]


@dataclass(frozen=True)
class Case:
    """`style` is the file's; `norms` and the like are the drafter's own switches."""

    name: str
    scheme: str | dict[str, Any] | None = None
    keep: tuple[str, ...] = ()
    style: str = "eagle"
    switches: dict[str, Any] = field(default_factory=dict)
    qk_norm: bool = False


CASES = (
    Case("bf16"),
    Case("w8a8-head", "W8A8"),
    Case("w4a16-asym-head", integer(4, False, 32)),
    Case("fp8-bf16-head", "FP8_DYNAMIC", keep=("lm_head",)),
    Case("int8-head-only", integer(8, True, None), keep=("re:midlayer.*", "fc")),
    Case(
        "speculators-qwen3-w4a16",
        integer(4, True, 32),
        style="speculators",
        switches={"norm_before_residual": True, "norm_output": True},
        qk_norm=True,
    ),
    Case("norm-before-fc", None, switches={"norm_before_fc": True}),
)


def weights_of(case: Case) -> dict[str, Tensor]:
    first = "midlayer" if case.style == "eagle" else "layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (H, 3 * H),
        f"{first}.input_layernorm.weight": (H,),
        f"{first}.hidden_norm.weight": (H,),
        f"{first}.self_attn.q_proj.weight": (HEADS * D, 2 * H),
        f"{first}.self_attn.k_proj.weight": (KV_HEADS * D, 2 * H),
        f"{first}.self_attn.v_proj.weight": (KV_HEADS * D, 2 * H),
        f"{first}.self_attn.o_proj.weight": (H, HEADS * D),
        f"{first}.post_attention_layernorm.weight": (H,),
        f"{first}.mlp.gate_proj.weight": (WIDTH, H),
        f"{first}.mlp.up_proj.weight": (WIDTH, H),
        f"{first}.mlp.down_proj.weight": (H, WIDTH),
        "norm.weight": (H,),
        "lm_head.weight": (DRAFT_V, H),
    }
    if case.qk_norm:
        shapes |= {f"{first}.self_attn.{one}_norm.weight": (D,) for one in "qk"}
    if case.switches.get("norm_before_fc"):
        shapes["input_norm.weight"] = (3 * H,)
    weights = {}
    for name, shape in shapes.items():
        drawn_as = name if len(shape) == 2 else f"{name}.norm.weight"
        weights[name] = torch.from_numpy(random_weight(drawn_as, shape, False)).bfloat16()
    ids = torch.arange(V)[torch.arange(V) % 3 != 1][:DRAFT_V]
    weights["d2t"] = ids - torch.arange(DRAFT_V)
    weights["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)
    return weights


def config_of(case: Case) -> dict[str, Any]:
    layer = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": D,
        "max_position_embeddings": 512,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "model_type": "qwen3" if case.qk_norm else "llama",
    }
    if case.style == "eagle":
        config = {"architectures": ["LlamaForCausalLMEagle3"], **layer, "torch_dtype": "bfloat16"}
        config |= {"draft_vocab_size": DRAFT_V, "eagle_config": {"eagle_aux_hidden_state_layer_ids": BOUNDARIES}}
        return config | case.switches
    method = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "draft_vocab_size": DRAFT_V,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        **case.switches,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": BOUNDARIES,
        "embed_requires_grad": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": "fewbits/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer,
        "torch_dtype": "bfloat16",
    }


# ---------------------------------------------------------------------------------- what it must guess, in float64


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [T, heads, D]."""
    frequency = THETA ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = positions[:, None, None] * frequency
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), dim=-1)


class Reference:
    """One row after the other, each seeing the keys and values of those before."""

    def __init__(self, case: Case, weights: dict[str, Tensor], embedding: Tensor) -> None:
        self.case, self.embedding = case, embedding
        self.first = "midlayer." if case.style == "eagle" else "layers.0."
        self.weights = {name: weight.double() for name, weight in weights.items() if name.endswith("weight")}
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def combine(self, states: Tensor) -> Tensor:
        """One row of states of the target."""
        if self.case.switches.get("norm_before_fc"):
            states = norm(states, self.weights["input_norm.weight"])
        return self.weights["fc.weight"] @ states

    def step(self, token: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the state that goes on."""

        def w(name: str) -> Tensor:
            return self.weights[f"{self.first}{name}.weight"]

        switches = self.case.switches
        position = torch.tensor([float(len(self.keys))], dtype=torch.float64)
        normed = norm(state, w("hidden_norm"))
        both = torch.cat((norm(self.embedding[token].double(), w("input_layernorm")), normed))
        q = (w("self_attn.q_proj") @ both).view(1, HEADS, D)
        k = (w("self_attn.k_proj") @ both).view(1, KV_HEADS, D)
        if self.case.qk_norm:
            q, k = norm(q, w("self_attn.q_norm")), norm(k, w("self_attn.k_norm"))
        self.keys.append(rotate(k, position)[0])
        self.values.append((w("self_attn.v_proj") @ both).view(KV_HEADS, D))
        q = rotate(q, position)[0]
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = torch.stack([key[group] @ q[head] for key in self.keys]) / D**0.5
            heads.append(torch.softmax(scores, 0) @ torch.stack([value[group] for value in self.values]))
        x = (normed if switches.get("norm_before_residual") else state) + w("self_attn.o_proj") @ torch.cat(heads)
        y = norm(x, w("post_attention_layernorm"))
        gate = w("mlp.gate_proj") @ y
        x = x + w("mlp.down_proj") @ (gate * torch.sigmoid(gate) * (w("mlp.up_proj") @ y))
        normed = norm(x, self.weights["norm.weight"])
        return self.weights["lm_head.weight"] @ normed, normed if switches.get("norm_output") else x


def expected(case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    states = torch.from_numpy(generator("drafter", "states").standard_normal((T, 3 * H))).float()
    tokens = torch.tensor([(7 * row + 5) % V for row in range(T)])
    embedding = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"]
    ids = torch.arange(DRAFT_V) + weights["d2t"]
    reference = Reference(case, weights, embedding)
    rows = []
    state = torch.zeros(H)
    for row in range(T):
        logits, state = reference.step(int(tokens[row]), reference.combine(states[row].double()))
        rows.append(logits)
    following, further = [], []
    for _ in range(2):
        following.append(int(ids[int(logits.argmax())]))
        logits, state = reference.step(following[-1], state)
        further.append(logits)
    return {
        "states": states,
        "tokens": tokens,
        "logits": torch.stack(rows),
        "next": torch.tensor(following),
        "further": torch.stack(further),
    }


# ---------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def make(case: Case) -> None:
    folder, weights = OUT / case.name, weights_of(case)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        config = config_of(case)
        written = json.dumps(config, indent=2) + "\n"
        (source / "config.json").write_text(written, encoding="utf-8")
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        if case.scheme is None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
        else:
            # llm-compressor reads the folder's config itself, and knows no speculators.
            plain = config.get("transformer_layer_config", config)
            (source / "config.json").write_text(json.dumps(plain), encoding="utf-8")
            model = load_drafter(source)
            quantize(model, case.scheme, case.keep)
            weights_again = load_drafter(source)
            (source / "config.json").write_text(written, encoding="utf-8")
            save(model, source, folder)
            weights |= decompress(folder, weights_again)
    save_file(expected(case, weights), folder / "expected.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES:
        make(case)
        print(case.name, flush=True)
    names = {case.name for case in CASES}
    lines = [
        "# Drafters",
        "",
        f"Random Eagle3 drafters for `{TARGET.relative_to(ROOT)}`, written by",
        f"`tools/{Path(__file__).name}`, which says",
        "what expected.safetensors holds. Quantized ones by llm-compressor "
        f"{version('llmcompressor')} and compressed-tensors {version('compressed-tensors')}.",
        "",
        *[f"- `{case.name}`" for case in CASES],
        "",
        "`tools/make_speculators_fixtures.py` has the speculators library write these, and say what they guess:",
        "",
        *[f"- `{folder.name}`" for folder in sorted(OUT.glob("speculators-*")) if folder.name not in names],
        "",
    ]
    (OUT / "README.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
