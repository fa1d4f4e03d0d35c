"""Model families: the table, and which family a config belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fewbits.checkpoint.config import Config
from fewbits.errors import PlanError
from fewbits.models import (
    deepseek,
    eagle3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    step3p5,
)
from fewbits.models.decoder import DecoderConfig
from fewbits.models.eagle3 import Eagle3Config


@dataclass(frozen=True, slots=True)
class Family:
    """`architectures` and `model_types` are what config.json calls it."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    configure: Callable[[Config], DecoderConfig | Eagle3Config]


FAMILIES = (
    Family("llama", ("LlamaForCausalLM",), ("llama",), llama.configure),
    Family("mistral", ("MistralForCausalLM",), ("mistral",), mistral.configure),
    Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), qwen2.configure),
    Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), qwen3.configure),
    Family("qwen2_moe", ("Qwen2MoeForCausalLM",), ("qwen2_moe",), qwen2_moe.configure),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3_moe",), qwen3_moe.configure),
    Family("mixtral", ("MixtralForCausalLM",), ("mixtral",), mixtral.configure),
    Family("gpt_oss", ("GptOssForCausalLM",), ("gpt_oss",), gpt_oss.configure),
    Family("deepseek_v2", ("DeepseekV2ForCausalLM",), ("deepseek_v2",), deepseek.configure_v2),
    # V3.2 is named to be refused with its reason.
    Family(
        "deepseek_v3",
        ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"),
        ("deepseek_v3", "deepseek_v32"),
        deepseek.configure_v3,
    ),
    Family("step3p5", ("Step3p5ForCausalLM",), ("step3p5",), step3p5.configure),
)
EAGLE3 = Family("eagle3", eagle3.ARCHITECTURES, (), eagle3.configure)  # reads a target's states: runs beside it alone


def with_mtp(family: Family) -> Family:
    """The family whose models are loaded with their MTP modules; where they have none, `configure` says so."""

    def configure(config: Config) -> DecoderConfig:
        model = family.configure(config)
        if not isinstance(model, DecoderConfig) or model.mtp is None:
            text = f"this {family.name} checkpoint has no modules for multi-token prediction that fewbits drafts with"
            raise PlanError("draft-no-mtp", text, source="config.json, num_nextn_predict_layers")
        return replace(model, drafts=True)

    return replace(family, configure=configure)


def family_for(config: Config) -> Family | None:
    """The family of a config.json (its text part), None when it is unknown.

    The first architecture decides. A multimodal wrapper's says nothing about the text model inside, and some
    files have none: there `model_type` decides.
    """
    if eagle3.is_drafter(config):
        return EAGLE3
    architectures = config.get("architectures", list, [])
    architecture = str(architectures[0]) if architectures else ""
    if architecture and not architecture.endswith("ForConditionalGeneration"):
        return next((family for family in FAMILIES if architecture in family.architectures), None)
    model_type = config.get("model_type", str, "")
    return next((family for family in FAMILIES if model_type in family.model_types), None)
