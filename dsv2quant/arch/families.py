"""The families: by the class that a config.json names, how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dsv2quant.arch import deepseek_moe, deepseek_v2, deepseek_v3, glm4_moe_lite, llama
from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.multimodal import language_config
from dsv2quant.arch.reading import Reader


class Family(NamedTuple):
    """What says that a config.json is of this family, and how it is read."""

    classes: tuple[str, ...]  # the language model's first
    model_types: tuple[str, ...]
    read: Callable[[Reader, str], ModelConfig]


FAMILIES = (
    Family((deepseek_v2.CAUSAL_LM, deepseek_v2.SEQUENCE_CLASSIFICATION), deepseek_v2.MODEL_TYPES, deepseek_v2.read),
    Family((deepseek_v3.CAUSAL_LM, deepseek_v3.SEQUENCE_CLASSIFICATION), deepseek_v3.MODEL_TYPES, deepseek_v3.read),
    Family((llama.CAUSAL_LM, llama.SEQUENCE_CLASSIFICATION), llama.MODEL_TYPES, llama.read),
    Family((deepseek_moe.CAUSAL_LM,), deepseek_moe.MODEL_TYPES, deepseek_moe.read),
    Family((glm4_moe_lite.CAUSAL_LM,), glm4_moe_lite.MODEL_TYPES, glm4_moe_lite.read),
)
CLASSES = {name: family for family in FAMILIES for name in family.classes}


def model_config(raw: Mapping[str, Any], where: object) -> ModelConfig:
    """The configuration of a parsed `config.json`, of a multimodal model that of its language model; `where` names it
    in errors.

    Raises InputError for another architecture, a value of the wrong type or range, or an unknown RoPE key.
    """
    read = Reader(language_config(raw, where), where)
    name = _class(read)
    family = CLASSES[name]
    read.require("model_type", family.model_types[0], family.model_types)
    return family.read(read, name)


def _class(read: Reader) -> str:
    """The class that the model is made for: `architectures` names it, or where that is missing `model_type` does."""
    names, kind = read.raw.get("architectures"), read.raw.get("model_type")
    if names is None and isinstance(kind, str):
        found = next((family.classes[0] for family in reversed(FAMILIES) if kind in family.model_types), None)
        if found is not None:
            return found
    if not isinstance(names, list) or len(names) != 1 or names[0] not in CLASSES:
        within = next((key for key in ("language_config", "text_config") if isinstance(read.raw.get(key), dict)), None)
        alone = f"; take the language model of {within} out, as a checkpoint of its own" if within else ""
        raise read.error("architectures", names, f"supported: {', '.join(CLASSES)}{alone}")
    return str(names[0])
