"""Models around a language model of the family: DeepSeek-VL, DeepSeek-VL2, DeepSeek-OCR, Kimi-VL.

Their config.json has the language model's own under a key; in the names of its tensors something else stands in the
place of `model.`, and before `lm_head`. What sees, and what joins it to the language model, is never quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv2quant.errors import InputError


@dataclass(frozen=True)
class Names:
    """How a checkpoint spells the language model's names: `root` stands for 'model.', and `head` before `lm_head` and
    `score`."""

    root: str = "model."
    head: str = ""

    def stored(self, name: str) -> str:
        """The name of a tensor or a module in the checkpoint, given the published one."""
        body = name.removeprefix("model.")
        return f"{self.head}{name}" if body == name else f"{self.root}{body}"


PUBLISHED = Names()
# What may stand before `layers` and `lm_head` where a program builds such a model, one or more of them: each has names
# of its own for the language model's modules (vLLM kimi_vl.py, deepseek_vl2.py and deepseek_ocr.py, SGLang
# deepseek_ocr.py, transformers modeling_deepseek_vl.py).
ROOTS = r"(?:(?:language_model|language|model)\.)"


@dataclass(frozen=True)
class Multimodal:
    """A model around a language model.

    `key`         of the language model's configuration in config.json
    `model_type`  the language model's, where its configuration names none
    `others`      what the names of all other tensors begin with
    `loaded_by`   the consumers that build the language model with a quantization, by vLLM's registry.py (0.32),
                  SGLang's models (0.5.23) and transformers 5.23, the latter with DeepSeek's own package where there is
                  one: SGLang's deepseek_vl2.py gives the language model no quantization, and its
                  MultiModalityCausalLM is Janus's alone
    `unlisted`    consumers that look for its modules under other names in plain lists of unquantized ones
    `tied`        what `tie_word_embeddings` is for the whole where config.json does not say; None: the language
                  model's own counts
    """

    key: str
    model_type: str
    others: tuple[str, ...]
    loaded_by: tuple[str, ...]
    unlisted: tuple[str, ...] = ()
    tied: bool | None = None

    def language_config(self, raw: Mapping[str, Any], where: object) -> dict[str, Any]:
        """config.json of the language model alone. Raises InputError where there is none in `raw`."""
        inner = raw.get(self.key)
        if not isinstance(inner, dict):
            fix = "get config.json again as it was published"
            raise InputError(f"{self.key}, the language model's configuration, is not an object", where=where, fix=fix)
        dtype = {} if inner.keys() & _DTYPES else {key: raw[key] for key in _DTYPES if key in raw}
        config = {"model_type": self.model_type} | dtype | inner
        if raw.get("quantization_config") is not None:
            config["quantization_config"] = raw["quantization_config"]
        if self.tied is not None:
            config["tie_word_embeddings"] = raw.get("tie_word_embeddings", self.tied)
        return config


_DTYPES = {"dtype", "torch_dtype"}
_DEEPSEEK_VL = Multimodal("language_config", "llama", ("vision_model.", "aligner."), ("transformers",))
_DEEPSEEK_VL2 = Multimodal(
    "language_config", "deepseek_v2", ("vision.", "projector.", "image_newline", "view_seperator", "tile_indicators"),
    ("vllm", "transformers"),
    # deepseek_vl2.py makes "language_model." of such a list's "language.", but calls the modules "language."
    unlisted=("vllm",),
)  # fmt: skip
_DEEPSEEK_OCR = Multimodal(
    "language_config", "deepseek_v2",
    (
        "model.sam_model.", "model.vision_model.", "model.qwen2_model.", "model.projector.", "model.image_newline",
        "model.view_seperator",
    ),
    ("vllm", "sglang"),
)  # fmt: skip
_KIMI_VL = Multimodal("text_config", "deepseek_v3", ("vision_tower.", "multi_modal_projector."), ("vllm", "sglang"))
_KIMI_K25 = Multimodal(
    "text_config", "deepseek_v3", ("vision_tower.", "mm_projector."), ("vllm", "sglang", "transformers")
)
# transformers' own classes of DeepSeek-VL, whose configurations tie by default
_CONVERTED_VL = Multimodal(
    "text_config", "llama", ("model.vision_model.", "model.aligner.", "model.high_res_vision_"), ("transformers",),
    tied=True,
)  # fmt: skip
# By class, and by model_type: DeepSeek-VL2's config.json names no class.
_MODELS = {
    "MultiModalityCausalLM": _DEEPSEEK_VL, "multi_modality": _DEEPSEEK_VL,
    "DeepseekVLV2ForCausalLM": _DEEPSEEK_VL2, "deepseek_vl_v2": _DEEPSEEK_VL2,
    "DeepseekOCRForCausalLM": _DEEPSEEK_OCR, "DeepseekOCR2ForCausalLM": _DEEPSEEK_OCR,
    "KimiVLForConditionalGeneration": _KIMI_VL, "kimi_vl": _KIMI_VL,
    "KimiK25ForConditionalGeneration": _KIMI_K25, "kimi_k25": _KIMI_K25,
    "DeepseekVLForConditionalGeneration": _CONVERTED_VL, "deepseek_vl": _CONVERTED_VL,
    "DeepseekVLHybridForConditionalGeneration": _CONVERTED_VL, "deepseek_vl_hybrid": _CONVERTED_VL,
}  # fmt: skip


def multimodal(raw: Mapping[str, Any]) -> Multimodal | None:
    """What a parsed config.json is of; None for a language model, or what is not known here."""
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else raw.get("model_type")
    return _MODELS.get(name) if isinstance(name, str) else None


def language_config(raw: Mapping[str, Any], where: object) -> Mapping[str, Any]:
    """config.json of a language model, alone or within another model. Raises InputError as `Multimodal` does."""
    whole = multimodal(raw)
    return raw if whole is None else whole.language_config(raw, where)
