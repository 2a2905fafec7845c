"""Tensors of other writers, as the published checkpoints have them.

Names differ by what a program wrapped the model in (`language_model.model.layers…`, or nothing: `layers…`) and by
LoRA's `base_layer`. Experts may be stacked: transformers 5 saves `mlp.experts.gate_up_proj` [experts, 2 × width,
hidden], gate before up, and `down_proj` [experts, hidden, width] with save_original_format=False; MLX writes
`mlp.switch_mlp.gate_proj`, `up_proj` and `down_proj`. In all of them an expert's matrix is one run of bytes in the
published orientation, so it is a stored tensor like any other: nothing is transposed, and one is read without the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dsv2quant.arch.config import ModelConfig
from dsv2quant.errors import InputError
from dsv2quant.storage.safetensors import PLAIN_DTYPES, StoredTensor

_EMBEDDING = "embed_tokens.weight"
_ROOT = re.compile(r"((?:(?:model|language_model|language|base_model|module|_orig_mod)\.)*)embed_tokens\.weight")
_BODY = re.compile(r"(embed_tokens|layers|norm)\.")
_HEAD = re.compile(r"((?:\w+\.)*)((?:lm_head|score)\..+)")
_STACK = re.compile(
    r"(model\.layers\.(\d+)\.mlp)\.(?:experts|switch_mlp)\.((?:gate|up|gate_up|down)_proj)(?:\.weight)?"
)
_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save)\.")


def as_published(tensors: Mapping[str, StoredTensor], config: ModelConfig, where: object) -> dict[str, StoredTensor]:
    """The tensors under their published names, a stack as one tensor per expert; what is not recognised stays.

    Raises InputError for two models or a LoRA adapter among the tensors, two spellings of one name, and a stack that
    does not have the configuration's shape.
    """
    adapter = next((name for name in tensors if _ADAPTER.search(name)), None)
    if adapter is not None:
        fix = "merge it into the weights first: PEFT's merge_and_unload"
        raise InputError(f"holds a LoRA adapter: {adapter}", where=where, fix=fix)
    root = _root(tensors, where)
    found: dict[str, StoredTensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        for split in _split(replace(tensor, name=_published(name, root)), config, where):
            if split.name in found:
                what = f"{origin[split.name]} and {name} are both {split.name}"
                raise InputError(what, where=where, fix="remove the one that is not the model's")
            found[split.name], origin[split.name] = split, name
    return found


def _root(names: Iterable[str], where: object) -> str:
    """What stands before `embed_tokens` and `layers`: 'model.' in published checkpoints."""
    roots = [match[1] for match in map(_ROOT.fullmatch, names) if match]
    if len(roots) > 1:
        what = f"holds two models: {roots[0]}{_EMBEDDING} and {roots[1]}{_EMBEDDING}"
        raise InputError(what, where=where, fix="leave the tensors of one")
    return roots[0] if roots else "model."


def _published(name: str, root: str) -> str:
    name = name.replace(".base_layer.", ".")
    body = name.removeprefix(root)
    if name.startswith(root) and _BODY.match(body):
        return f"model.{body}"
    head = _HEAD.fullmatch(name)
    return head[2] if head and root.startswith(head[1]) else name


def _split(tensor: StoredTensor, config: ModelConfig, where: object) -> Iterator[StoredTensor]:
    """A stack's matrices, expert by expert; any other tensor as it is."""
    match = _STACK.fullmatch(tensor.name)
    if match is None or int(match[2]) >= config.num_hidden_layers:
        yield tensor
        return
    at, names = match[1], ("gate_proj", "up_proj") if match[3] == "gate_up_proj" else (match[3],)
    shape = (config.moe_intermediate_size, config.hidden_size)
    rows, cols = shape[::-1] if names == ("down_proj",) else shape
    wanted = (config.n_routed_experts, len(names) * rows, cols)
    where = f"{where}/{tensor.file}"
    if tensor.shape != wanted:
        turned = tensor.shape == (wanted[0], wanted[2], wanted[1])
        fix = "transpose each expert: transformers 5 and MLX store [out, in]" if turned else "correct config.json"
        what = f"{tensor.name} has shape {list(tensor.shape)}, config.json implies {list(wanted)}"
        raise InputError(what, where=where, fix=fix)
    if tensor.dtype not in PLAIN_DTYPES:
        fix = f"stacked experts are read in {', '.join(PLAIN_DTYPES)}: give the unquantized checkpoint"
        raise InputError(f"{tensor.name} has dtype {tensor.dtype}", where=where, fix=fix)
    nbytes = tensor.nbytes // (wanted[0] * len(names))
    for i in range(wanted[0] * len(names)):
        expert, part = divmod(i, len(names))
        name = f"{at}.experts.{expert}.{names[part]}.weight"
        yield StoredTensor(name, tensor.dtype, (rows, cols), tensor.file, tensor.begin + i * nbytes, nbytes)
