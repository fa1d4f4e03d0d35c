"""Writes those of tests/exports/drafters that the speculators library itself makes: random Eagle3 drafters.

    python tools/make_speculators_fixtures.py

Needs tools/speculators-requirements.txt, in an environment of its own. expected.safetensors holds what
tools/make_drafter_fixtures.py says, from the library's own forward pass in float32. Its training steps are what
drafting does: each reads what the drafter gave for the token before, and the token that comes next, which is put behind
the others here.
"""

from __future__ import annotations

import os
import shutil
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from fixture_models import generator, random_weight
from safetensors.torch import load_file, save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.proposals.greedy import GreedyTokenProposalConfig
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tests" / "exports" / "drafters"
TARGET = ROOT / "tests" / "fixtures" / "w4a16-asym-g32-head-f32"
H, V, DRAFT_V, T, GUESSES = 64, 96, 64, 12, 2
LAYER: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Case:
    name: str
    layer: type[PretrainedConfig]
    switches: dict[str, bool]


CASES = (
    Case("speculators-llama", LlamaConfig, {"fc_norm": True}),
    Case("speculators-qwen3", Qwen3Config, {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}),
)


def drafter(case: Case) -> Eagle3DraftModel:
    layer = case.layer(**LAYER)
    layer._attn_implementation = "eager"
    method = GreedyTokenProposalConfig(speculative_tokens=3)
    verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=DRAFT_V,
        eagle_aux_hidden_state_layer_ids=[0, 1, 2],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3", proposal_methods=[method], default_proposal_method="greedy", verifier=verifier
        ),
        **case.switches,
    )
    model = Eagle3DraftModel(config)
    ids = torch.arange(V)[torch.arange(V) % 3 != 1][:DRAFT_V]
    model.load_vocab_mappings(torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True), ids - torch.arange(DRAFT_V))
    for name, parameter in model.named_parameters():
        drawn_as = name if parameter.dim() == 2 else f"{name}.norm.weight"
        parameter.copy_(torch.from_numpy(random_weight(drawn_as, tuple(parameter.shape), False)).bfloat16())
    model.embed_tokens.weight.copy_(load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"].bfloat16())
    return model


def expected(model: Eagle3DraftModel) -> dict[str, Tensor]:
    states = torch.from_numpy(generator("drafter", "states").standard_normal((T, 3 * H))).float()
    tokens = torch.tensor([(7 * row + 5) % V for row in range(T)])
    unread = torch.zeros(GUESSES, 3 * H)  # of the places where guesses stand
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits[0].clone()))
    following: list[int] = []
    for steps in range(1, GUESSES + 2):
        seen.clear()
        places = torch.tensor([*following, *[0] * (GUESSES - len(following))])
        ids = torch.cat((tokens, places))[None]
        model(torch.cat((states, unread))[None], ids, torch.zeros_like(ids), ttt_steps=steps)
        best = int(seen[-1][T - 1].argmax())
        following.append(best + int(model.d2t[best]))
    hook.remove()
    return {
        "states": states,
        "tokens": tokens,
        "logits": seen[0][:T],
        "next": torch.tensor(following[:GUESSES]),
        "further": torch.stack([logits[T - 1] for logits in seen[1:]]),
    }


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for case in CASES:
        model, folder = drafter(case), OUT / case.name
        shutil.rmtree(folder, ignore_errors=True)
        deepcopy(model).bfloat16().save_pretrained(folder)
        (folder / "config.py").unlink()  # the library's source of its config class
        save_file(expected(model), folder / "expected.safetensors")
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
