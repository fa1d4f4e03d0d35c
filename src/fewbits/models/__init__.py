"""Model families: the table, and which family a config belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbits.checkpoint.config import Config
from fewbits.models import deepseek, llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe, step3p5
from fewbits.models.decoder import DecoderConfig


@dataclass(frozen=True, slots=True)
class Family:
    """`architectures` and `model_types` are what config.json calls it."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    configure: Callable[[Config], DecoderConfig]


FAMILIES = (
    Family("llama", ("LlamaForCausalLM",), ("llama",), llama.configure),
    Family("mistral", ("MistralForCausalLM",), ("mistral",), mistral.configure),
    Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), qwen2.configure),
    Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), qwen3.configure),
    Family("qwen2_moe", ("Qwen2MoeForCausalLM",), ("qwen2_moe",), qwen2_moe.configure),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3_moe",), qwen3_moe.configure),
    Family("mixtral", ("MixtralForCausalLM",), ("mixtral",), mixtral.configure),
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


def family_for(config: Config) -> Family | None:
    """The family of a config.json (its text part), None when it is unknown.

    The first architecture decides. A multimodal wrapper's says nothing about the text model inside, and some
    files have none: there `model_type` decides.
    """
    architectures = config.get("architectures", list, [])
    architecture = str(architectures[0]) if architectures else ""
    if architecture and not architecture.endswith("ForConditionalGeneration"):
        return next((family for family in FAMILIES if architecture in family.architectures), None)
    model_type = config.get("model_type", str, "")
    return next((family for family in FAMILIES if model_type in family.model_types), None)
