"""The weights of a checkpoint in Hugging Face layout: every tensor that a configuration implies, paired with the parts
that store it, under whatever name.

Names differ by what a program wrapped the model in (`language_model.model.layers…`, or nothing: `layers…`) and by
LoRA's `base_layer`. Experts may be stacked: transformers 5 saves `mlp.experts.gate_up_proj` [experts, 2 × width,
hidden], gate before up, and `down_proj` [experts, hidden, width] with save_original_format=False; MLX writes
`mlp.switch_mlp.gate_proj`, `up_proj` and `down_proj`. In all of them an expert's matrix is one run of bytes in the
published orientation, so it is a stored tensor like any other: nothing is transposed, and one is read without the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.multimodal import Multimodal, Names
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.codec import Codec
from dsv2quant.formats.declared import contradiction, left_out, unread
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.int4 import GROUP_INDEX, PACKED, ZERO_POINT
from dsv2quant.formats.quant_config import kv_scale_parts
from dsv2quant.storage.safetensors import PLAIN_DTYPES, Part, StoredTensor, stored_tensors

BLOCKS = "blocks"  # the suffix of a GGUF weight's bytes, uint8 [rows, bytes]
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PREDICTION = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head)\.")  # DeepSeek-V3's names
_PACKED = (PACKED, "qweight")  # suffixes of INT4 codes
_MARKS = {ZERO_POINT: "asym", GROUP_INDEX: "g_idx"}  # what `stored_scheme` adds for the parts that others' files have
# What follows the last dot of a quantized weight's parts, of the schemes that are not read too.
_QUANTIZED = (
    "scale", "scale_inv", "scale_2", "global_scale", "zero_point", "zeros", "qzeros", "scales", "g_idx", "packed",
    "shape", "absmax", "compressed", "bitmask", "k_scale", "v_scale",
)  # fmt: skip
_CODES = ("F8_E4M3", "F8_E5M2", "I8")  # dtypes that none but quantized weights have
_EMBEDDING = "embed_tokens.weight"
_HEADS = {"lm_head.weight", "score.weight"}
_ROOT = re.compile(r"((?:(?:model|language_model|language|base_model|module|_orig_mod)\.)*)embed_tokens\.weight")
_BODY = re.compile(r"(embed_tokens|layers|norm)\.")
_HEAD = re.compile(r"((?:\w+\.)*)((?:lm_head|score)\..+)")
_STACK = re.compile(
    r"(model\.layers\.(\d+)\.mlp)\.(?:experts|switch_mlp)\.((?:gate|up|gate_up|down)_proj)(?:\.weight)?"
)
_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save)\.")


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as this checkpoint stores it: its scheme, and its parts by suffix.

    `scheme` is 'bf16' for every unquantized tensor; `parts` then has one entry, whose dtype may be BF16, F16 or F32. In
    a GGUF file schemes are block types ('q4_k'), and kv_b_proj has two parts, whose types may differ ('q5_0+q4_k').
    """

    spec: TensorSpec
    scheme: str
    parts: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def stored_scheme(self) -> str:
        """The scheme, or the dtype of an unquantized weight that is stored wider: 'f16', 'f32'. Of others' INT4 with
        zero points or scattered groups: 'int4-g128-asym', 'int4-g128-asym-g_idx'."""
        plain = {"F16": "f16", "F32": "f32"} if self.scheme == "bf16" else {}
        marks = [mark for suffix, mark in _MARKS.items() if suffix in self.parts]
        return "-".join((plain.get(self.stored.dtype, self.scheme), *marks))

    @property
    def stored(self) -> StoredTensor:
        """The part that holds the weight itself, or its codes."""
        return next(iter(self.parts.values()))

    def rows(self, begin: int, end: int) -> Weight:
        """Some rows of a weight that is one part, as a weight."""
        (suffix, part), shape = next(iter(self.parts.items())), (end - begin, *self.spec.shape[1:])
        width = part.nbytes // self.spec.shape[0]
        part = replace(part, shape=shape, begin=part.begin + begin * width, nbytes=(end - begin) * width)
        return replace(self, parts={suffix: part})


def check_quantization(quantization: Mapping[str, Any] | None, where: object) -> None:
    """Raise InputError for a quantization that is not read."""
    if quantization is None:
        return
    method = quantization.get("quant_method")
    if method not in ("fp8", "compressed-tensors", "gptq", "awq"):
        what = f"is quantized with {method!r}"
        raise InputError(what, where=where, fix="give the unquantized checkpoint, or a block-FP8 one")
    blocks = quantization.get("weight_block_size")
    if method == "fp8" and blocks not in (None, [BLOCK, BLOCK]):
        what = f"is FP8 in blocks of {blocks!r}"
        raise InputError(what, where=where, fix=f"only {[BLOCK, BLOCK]} is read: give the unquantized checkpoint")
    if method == "compressed-tensors" and (unknown := unread(quantization)):
        fix = "it is not read: give the checkpoint it was made from"
        raise InputError(f"quantization_config has {unknown}", where=f"{where}/config.json", fix=fix)
    if method not in ("gptq", "awq"):
        return
    key, layout, bits = ("checkpoint_format", "gptq", (4, 3, 2)) if method == "gptq" else ("version", "gemm", (4,))
    found = {key: quantization.get(key, layout), "bits": quantization.get("bits", quantization.get("w_bit"))}
    for name, values in {key: (layout,), "bits": bits}.items():
        if (found[name].lower() if isinstance(found[name], str) else found[name]) not in values:
            what = f"is {method.upper()} with {name} {found[name]!r}"
            raise InputError(what, where=where, fix=f"only {' or '.join(map(repr, values))} is read")


def index_tensors(headers: Mapping[str, Mapping[str, Any]], where: object) -> dict[str, StoredTensor]:
    """The tensors of all shards by name. Raises InputError where one lies in two."""
    tensors: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for tensor in stored_tensors(header, file, f"{where}/{file}"):
            if tensor.name in tensors:
                what = f"{tensor.name} lies in {tensors[tensor.name].file} and in {file}"
                raise InputError(what, where=where, fix="each tensor must lie in one shard")
            tensors[tensor.name] = tensor
    return tensors


def split_off(tensors: Mapping[str, StoredTensor], whole: Multimodal | None, where: object) -> list[StoredTensor]:
    """What of a multimodal model is not its language model, in order of names. Raises InputError where that is
    quantized: it is only copied, and a new quantization_config would not declare it."""
    others = [tensors[name] for name in sorted(tensors) if whole is not None and name.startswith(whole.others)]
    if codes := [t.name for t in others if t.dtype in _CODES or t.name.endswith(_PACKED)]:
        what = f"{len(codes)} tensors beside the language model's are quantized: {listing(codes)}"
        raise InputError(what, where=where, fix="give a checkpoint in which only the language model is")
    return others


def as_published(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, where: object
) -> tuple[dict[str, StoredTensor], Names]:
    """The tensors under their published names, a stack as one tensor per expert, and how they were spelled; what is
    not recognised stays.

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
    heads = [match[1] for name in found.keys() & _HEADS if (match := _HEAD.fullmatch(origin[name]))]
    return found, Names(root, *heads[:1])


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


def without_missing_prediction(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> ModelConfig:
    """The configuration without layers for multi-token prediction, where a checkpoint that declares them has none of
    their tensors: many programs drop them, and the model is the same."""
    first = config.num_hidden_layers
    indices = {int(match[1]) for match in map(_LAYER.match, tensors) if match}
    held = indices & set(range(first, first + config.num_nextn_predict_layers))
    return config if held else replace(config, num_nextn_predict_layers=0)


def take_kv_scales(
    config: ModelConfig, tensors: dict[str, StoredTensor], where: object
) -> dict[int, tuple[StoredTensor, ...]]:
    """Take the KV-cache scales that the configuration declares out of `tensors`: every layer's, or none. Of a latent
    cache, which has no values, only the keys' are kept."""
    found: dict[int, tuple[StoredTensor, ...]] = {}
    names = {
        f"model.layers.{layer}.self_attn.{part.suffix}": layer
        for part in kv_scale_parts(config.quantization)
        for layer in range(config.num_hidden_layers)
    }
    missing = [name for name in names if name not in tensors]
    if len(missing) < len(names) and missing:
        what = f"{len(missing)} KV-cache scales are missing: {listing(missing)}"
        raise InputError(what, where=where, fix="download the missing shards")
    for name, layer in names.items() if not missing else ():
        tensor = tensors.pop(name)
        if tensor.dtype not in PLAIN_DTYPES or tensor.shape not in ((), (1,)):
            what = f"{name} is {tensor.dtype} {list(tensor.shape)}"
            raise InputError(what, where=f"{where}/{tensor.file}", fix="a KV-cache scale is one plain number")
        if not (found.get(layer) and config.is_mla):
            found[layer] = (*found.get(layer, ()), tensor)
    return found


def match(
    specs: Iterable[TensorSpec],
    tensors: dict[str, StoredTensor],
    codecs: Callable[[str], Sequence[Codec]],
    where: object,
) -> list[Weight]:
    """Pair every tensor of the model with its stored parts, in one of the codecs of its module; whatever is left over,
    missing or mis-shaped is an error."""
    specs = [spec for spec in specs if not spec.is_optional or _held(spec, tensors) is not None]
    # Old checkpoints store RoPE's frequencies, which follow from config.json.
    kept = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    missing = [spec.name for spec in specs if _held(spec, tensors) is None]
    if missing:
        modules = {spec.module for spec in specs}
        raise _missing(missing, [name for name in kept if name.rpartition(".")[0] not in modules], where)
    weights = [_weight(spec, tensors, codecs(spec.module), where) for spec in specs]
    used = {part.name for weight in weights for part in weight.parts.values()}
    surplus = [name for name in kept if name not in used]
    parts = [name for name in surplus if _is_quantization(name)]
    if parts:
        what = f"{len(parts)} tensors belong to a quantization that quantization_config does not declare: "
        fix = "without them the weights are others: give config.json as it was published, and remove nothing"
        raise InputError(what + listing(parts), where=where, fix=fix)
    if surplus:
        layers = 1 + max(spec.layer for spec in specs if spec.layer is not None)
        raise _surplus(surplus, layers, where)
    return weights


def _missing(missing: list[str], others: list[str], where: object) -> InputError:
    what = f"{len(missing)} tensors that config.json implies are missing: {listing(missing)}"
    if not others:
        return InputError(what, where=where, fix="download the missing shards, or correct config.json")
    prefix = os.path.commonprefix(others).rpartition(".")[0]  # noqa: RUF071 - names, not paths
    what += f"; {len(others)} others are there{f' under {prefix!r}' if prefix else ''}: {listing(others)}"
    return InputError(what, where=where, fix="names are read as DeepSeek, transformers, MLX and PEFT write them")


def _surplus(surplus: list[str], layers: int, where: object) -> InputError:
    """Tensors that the model doesn't have, of which those beyond the last layer are told apart."""
    beyond = [name for name in surplus if (match := _LAYER.match(name)) and int(match[1]) >= layers]
    if any(_PREDICTION.search(name) for name in beyond):
        what = f"holds a multi-token prediction layer, {len(beyond)} tensors: {listing(beyond)}"
        fix = "config.json must declare it as num_nextn_predict_layers; of a model that can't, leave its tensors out"
    elif beyond:
        what = f"{len(beyond)} tensors beyond the {layers} layers of config.json: {listing(beyond)}"
        fix = "correct num_hidden_layers, or remove them"
    else:
        what = f"{len(surplus)} tensors that config.json does not imply: {listing(surplus)}"
        fix = "correct config.json, or remove them"
    return InputError(what, where=where, fix=fix)


def _is_quantization(name: str) -> bool:
    """Whether a tensor's name is that of a quantized weight's part."""
    return name.rpartition(".")[2].removeprefix("weight_").removeprefix("input_") in _QUANTIZED


def check_declared(weights: Iterable[Weight], quantization: Mapping[str, Any] | None, where: object) -> None:
    """Raise InputError where the configuration contradicts a quantized weight."""
    if quantization is None:
        return
    is_left_out = left_out(quantization)
    for weight in weights:
        if weight.scheme == "bf16":
            continue
        wrong = None
        if is_left_out(weight.spec.module):
            wrong = "is quantized, but quantization_config lists it as left out"
        elif PACKED in weight.parts:
            columns, groups = weight.spec.shape[1], weight.parts["weight_scale"].shape[1]
            bits = 32 * weight.parts[PACKED].shape[1] // columns
            wrong = contradiction(quantization, bits, columns, groups, weight.parts)
        if wrong is not None:
            fix = "weights and config.json must be of one publication: get both again"
            raise InputError(f"{weight.spec.module} {wrong}", where=where, fix=fix)


def _held(spec: TensorSpec, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The tensor under the model's own name or, of a matrix, its packed codes."""
    names = [spec.name, *(f"{spec.module}.{suffix}" for suffix in _PACKED if not spec.keep)]
    return next((tensors[name] for name in names if name in tensors), None)


def _weight(spec: TensorSpec, tensors: Mapping[str, StoredTensor], codecs: Sequence[Codec], where: object) -> Weight:
    held = _held(spec, tensors)
    assert held is not None
    where = f"{where}/{held.file}"
    if held.name == spec.name and held.shape != spec.shape:
        what = f"{spec.name} has shape {list(held.shape)}, config.json implies {list(spec.shape)}"
        raise InputError(what, where=where, fix="correct config.json, or download the right shard")
    if held.dtype in PLAIN_DTYPES:
        return Weight(spec, "bf16", {spec.name.rpartition(".")[2]: held})
    if spec.keep or held.dtype not in ("F8_E4M3", "I8", "I32"):
        readable = "BF16, F16, F32" + (", F8_E4M3" if not spec.keep else "")
        raise InputError(f"{held.name} has dtype {held.dtype}", where=where, fix=f"it must be one of {readable}")
    lacking: list[tuple[int, str]] = []  # how many other parts are there, and the first that is not
    misfits: list[list[StoredTensor]] = []
    for codec in (codec for codec in codecs if codec.refusal(spec.shape) is None):
        layout = codec.layout(spec.shape)
        known = {f"{spec.module}.{part.suffix}": part for part in (*layout, *codec.others(spec.shape))}
        parts = {part.suffix: tensors[name] for name, part in known.items() if name in tensors}
        if held not in parts.values() or not _fits(layout[0], held):
            continue
        missing = [part.suffix for part in layout if part.suffix not in parts]
        wrong = [tensors[name] for name, part in known.items() if name in tensors and not _fits(part, tensors[name])]
        if not missing and not wrong:
            return Weight(spec, codec.name, parts)
        if wrong:
            misfits.append(wrong)
        else:
            lacking.append((len(parts), missing[0]))
    found_parts, first = max(lacking, key=lambda item: item[0], default=(0, ""))
    if found_parts > 1 or (lacking and not misfits):
        kind = {"F8_E4M3": "FP8", "I8": "INT8"}.get(held.dtype, "INT4")
        what = f"{held.name} is {kind} but has no {spec.module.rpartition('.')[2]}.{first}"
        fix = "download the shard that holds it: without it the codes mean nothing"
        raise InputError(what, where=where, fix=fix)
    odd = min(misfits, key=len, default=[held])[0]
    what = f"{odd.name}, {odd.dtype} {list(odd.shape)}, does not fit a weight of shape {list(spec.shape)}"
    fix = "scales are per 128×128 block, per row or per tensor, of INT4 per 32, 64 or 128 columns or per row"
    raise InputError(what, where=where, fix=fix)


def _fits(part: Part, stored: StoredTensor) -> bool:
    """Whether a stored tensor is this part; scales may have any plain dtype, those of FP8 e8m0 as well."""
    dtypes: tuple[str, ...] = (part.dtype,)
    if part.dtype in PLAIN_DTYPES:
        dtypes = (*PLAIN_DTYPES, "F8_E8M0") if part.dtype == "F32" else PLAIN_DTYPES
    elif part.suffix == "weight_shape":
        dtypes = ("I64", "I32")  # the latter in Kimi-K2-Thinking
    return stored.shape == part.shape and stored.dtype in dtypes
