"""The metadata of a GGUF file: the keys, values and order that llama.cpp's tools give.

Sources: llama.cpp conversion/base.py (ModelBase.prepare_metadata), as it runs with a transformers that knows
DeepSeek-V2; then llama-quantize (src/llama-quant.cpp) moves two keys to the end.
"""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, size_label
from gguf import Metadata as Card
from yaml import YAMLError

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.deepseek_v2 import GGUF_PLAIN
from dsv2quant.arch.multimodal import language_config
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.errors import InputError
from dsv2quant.planning.gguf_keys import model_keys
from dsv2quant.planning.gguf_loadable import check_loadable
from dsv2quant.storage.files import MAX_CARRIED_BYTES, read_bytes
from dsv2quant.storage.gguf import Value, check_numbers, string, u32, written
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.chat import Chat, Templates
from dsv2quant.text.gguf_tokenizer import tokenizer_metadata

_CARD = "correct its front matter, or remove the file"
# Keys of generation_config.json in the order of the file, by gguf.Metadata's names. The last that is there counts.
_SAMPLING = {
    "sequence": ("sequence",), "top_k": ("top_k",), "top_p": ("top_p",), "min_p": ("min_p",),
    "xtc_probability": ("xtc_probability",), "xtc_threshold": ("xtc_threshold",), "temp": ("temperature",),
    "penalty_last_n": ("penalty_last_n",), "penalty_repeat": ("repetition_penalty", "penalty_repeat"),
    "mirostat": ("mirostat",), "mirostat_tau": ("mirostat_tau",), "mirostat_eta": ("mirostat_eta",),
}  # fmt: skip


def model_metadata(checkpoint: HfCheckpoint, file_type: int, *, drop_expert_groups: bool = False) -> dict[str, Value]:
    """Every key but imatrix's, in the order of the file. `file_type` is llama.cpp's ftype (Q4_K_M is 15).

    `drop_expert_groups` leaves out both group keys: llama.cpp then chooses from all experts.
    Raises InputError for what llama.cpp can't load, and for a damaged tokenizer, model card or generation config.
    """
    folder = checkpoint.downloaded
    raw = language_config(checkpoint.raw_config, folder)
    check_loadable(checkpoint.config, folder, drop_expert_groups=drop_expert_groups)
    values = {
        **_first(checkpoint.config),
        **_general(checkpoint, folder),
        **model_keys(checkpoint.config, raw, drop_expert_groups=drop_expert_groups),
        **tokenizer_metadata(folder, checkpoint.config),
        "general.quantization_version": u32(GGML_QUANT_VERSION),
        "general.file_type": u32(file_type),
    }
    check_numbers(values, folder)
    return values


def _first(config: ModelConfig) -> dict[str, Value]:
    """What the converter writes before all else: of DeepSeek-OCR a chat template, which the tokenizer's replaces."""
    found = {"general.architecture": string(config.gguf)}
    if config.gguf == GGUF_PLAIN:
        found["tokenizer.chat_template"] = string("{% for m in messages %}{{m['content']}}{% endfor %}")
    return found


def _general(checkpoint: HfCheckpoint, folder: Path) -> dict[str, Value]:
    """general.*: the model's name, size, licence and so on, by gguf-py's own heuristics.

    They look at the folder's name. That of a hub's snapshot is a commit, so the hub id's takes its place.
    """
    tensors = architecture(checkpoint.config).gguf_tensors()
    total = sum(prod(tensor.shape) for tensor in tensors)
    source = checkpoint.raw_config.get("_name_or_path")
    named = {"_name_or_path": source if isinstance(source, str) else None}
    path = folder / "generation_config.json"
    sampling = read_json(path) if path.exists() else {}
    where = f"{folder}/README.md or {path.name}"
    writer = GGUFWriter(path=None, arch=checkpoint.config.gguf)
    writer.add_type(GGUFType.MODEL)
    try:
        card = Card.apply_metadata_heuristic(Card(), _front_matter(folder), named, Path(checkpoint.model), total)
        for name, keys in _SAMPLING.items():
            for key in keys:
                setattr(card, f"sampling_{name}", sampling.get(key, getattr(card, f"sampling_{name}")))
        card.size_label = card.size_label or _size_label(tensors, total)
        card.set_gguf_meta_model(writer)
    except (TypeError, ValueError, AttributeError, IndexError) as error:  # gguf-py checks no type
        raise InputError(f"can't be read as a model card: {error}", where=where, fix=_CARD) from None
    return written(writer, where)


def _front_matter(folder: Path) -> dict[str, Any]:
    if (folder / "README.md").exists():
        read_bytes(folder / "README.md", MAX_CARRIED_BYTES)  # gguf-py opens it unchecked
    try:
        return Card.load_model_card(folder)
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not a model card: {error}", where=folder / "README.md", fix=_CARD) from None


def _size_label(tensors: list[GgufTensor], total: int) -> str:
    """'64x1.5B': the experts, and the parameters of the model that has one of them (GGUFWriter, gguf-py)."""
    stacks = [tensor for tensor in tensors if tensor.specs[0].expert is not None]
    shared = total - sum(prod(tensor.shape) for tensor in stacks)
    one_expert = sum(prod(tensor.shape[1:]) for tensor in stacks)
    return str(size_label(total, shared, one_expert, stacks[0].matrices if stacks else 0))


def warnings(checkpoint: HfCheckpoint) -> list[str]:
    """What the user of the GGUF file should know, in one line each; none for a model that runs as it was trained."""
    found = []
    config = checkpoint.config
    if config.num_nextn_predict_layers:
        found.append(
            f"layers for multi-token prediction are left out, {config.num_nextn_predict_layers}: llama.cpp runs the "
            "model without them."
        )
    if config.n_group > 1 and config.group_score == "max":
        found.append(
            f"llama.cpp chooses among the {config.n_group} groups of experts by the sum of each group's two "
            "best scores (as DeepSeek-V3 does), not by the best one as DeepSeek-V2 was trained: some tokens go to "
            "other experts. --drop-expert-groups lets it choose from all experts instead; measure which is better."
        )
    found += checkpoint.bos_note()
    if _prompt_ends_in_space(checkpoint):
        found.append(
            "the chat template's generation prompt ends with a space after 'Assistant:', which no token of an answer "
            "follows: DeepSeek-V2-Lite then answers in Chinese or repeats itself. Remove the space from chat_template."
        )
    return found


def _prompt_ends_in_space(checkpoint: HfCheckpoint) -> bool:
    try:
        templates = checkpoint.templates()
        prompt = _prompt_of(templates.choose(False), tuple(templates.tokens.items()))
    except InputError:  # no template, a broken one, or none downloaded: nothing that a conversion depends on
        return False
    return prompt != prompt.rstrip() and prompt.rstrip().endswith("Assistant:")


@cache  # a program is run for it, and a release has many files of one model
def _prompt_of(template: str, tokens: tuple[tuple[str, str], ...]) -> str:
    chat = Chat([{"role": "user", "content": "?"}], "the model")
    (prompt,) = Templates({"default": template}, "the model", dict(tokens)).render([chat], generation_prompt=True)
    return prompt
