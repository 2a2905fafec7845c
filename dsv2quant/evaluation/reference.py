"""A kept reference: what a model's distributions over the windows of a text are made of, in one file, so that a model
is scored once and many are held against it.

A row of logits is the head's product with one hidden state, which is far narrower: 2,048 values beside a vocabulary of
102,400 in V2-Lite. The file holds the states behind the last layer as they were computed, and final norm and head once.
The same product then gives the same distributions over the whole vocabulary, to the bit on the same machine: KLD, top-1
and perplexity are those of the live reference, and no tail is cut off. Elsewhere the product may round otherwise, which
costs no more than another batch does (`NoiseFloor`). Experts chosen are kept too, and the noise floor.

A safetensors file, whose widest elements come first:

    ids             int32 [windows, ctx]                the text's tokens
    hidden          `dtype` [windows, ctx − first, hidden]   of positions first … ctx − 1; the last predicts nothing
    norm, head      `dtype`, or bfloat16 where that loses nothing: [hidden], [vocabulary, hidden]
    routes.<layer>  uint8 or int16 [windows, ctx, k]    of layers with routed experts

`__metadata__.reference` is JSON: the weights as `Scored` names them and the identity of what an artifact was made
from, text, protocol and all else that was computed with, the noise floor, and a digest of this and the arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from dsv2quant.calib.statistics import digest_of
from dsv2quant.errors import InputError, listing
from dsv2quant.evaluation.divergence import Held, Pass, Routes
from dsv2quant.evaluation.results import NoiseFloor
from dsv2quant.kernels.reference import linear
from dsv2quant.model.layers import RMSNorm
from dsv2quant.planning.options import PROTOCOLS
from dsv2quant.storage.durable import write_whole
from dsv2quant.storage.files import AGAIN
from dsv2quant.storage.safetensors import Output, Shard, read_header, stored_tensors

SCHEMA = "dsv2quant.reference/1"
OURS = "give the file that `eval-ppl --save-reference` made"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8"}
HELD = 512 << 20  # bytes of logits
_PIECE = 16 << 20  # bytes that are copied at a time
_MOST_LAYERS = 1 << 12  # of any model
_WEIGHTS = ("model", "revision", "digest", "manifest_sha256", "identity")


def _is_weights(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {*_WEIGHTS} and isinstance(value["identity"], str)


def _is_floor(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == set(NoiseFloor.__annotations__)


def _is_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("source", "sha256"))


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


_HEADER: dict[str, Callable[[Any], bool]] = {  # key → whether its value is what it must be
    "weights": _is_weights,
    "source": lambda value: value is None or isinstance(value, str),
    "noise_floor": _is_floor,
    "text": _is_text,
    "protocol": lambda value: value in PROTOCOLS,
    "dtype": lambda value: value in ("float32", "bfloat16"),
    "decode_path": lambda value: isinstance(value, bool),
    "first": lambda value: type(value) is int and value >= 0,
    "eps": lambda value: isinstance(value, float),
    "digest": lambda value: isinstance(value, str),
} | dict.fromkeys(("ctx", "windows", "vocabulary", "layers"), _is_count)


@dataclass(frozen=True)
class Reference:
    """What a model is compared with: `weights` as `Scored` names them, their pass over the windows, which may be held,
    too, and its noise."""

    weights: Mapping[str, Any]
    passed: Pass
    noise_floor: NoiseFloor
    held: Held | None = None

    @property
    def distributions(self) -> Pass | Held:
        """What ln p is made of."""
        return self.held or self.passed

    def part(self, windows: slice) -> Reference:
        """The same over some of its windows."""
        held = None if self.held is None else self.held.part(windows)
        return Reference(self.weights, self.passed.part(windows), self.noise_floor, held)


@dataclass(frozen=True)
class KeptHead:
    """Final norm and head [vocabulary, hidden], on the device where logits are made."""

    norm: RMSNorm
    weight: torch.Tensor

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """As `Ends`; x may lie elsewhere."""
        return linear(self.norm(x.to(self.weight.device)), self.weight)


@dataclass(frozen=True)
class KeptReference:
    """An opened file. `about` is what its header says."""

    path: Path
    about: Mapping[str, Any]

    @classmethod
    def opened(cls, path: Path) -> KeptReference:
        """Read the whole file once. Raises InputError where it is damaged, or none of these."""
        layout, _ = read_header(path)
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("reference", "")
        try:
            about = json.loads(said)
        except (ValueError, RecursionError):
            about = None
        if not isinstance(about, dict) or "schema" not in about:
            raise InputError("is no kept reference", where=path, fix=OURS)
        if about["schema"] != SCHEMA:
            what = f"has schema {about['schema']!r:.60}, not {SCHEMA}"
            raise InputError(what, where=path, fix="score the reference again with this version")
        lacking = [key for key, is_right in _HEADER.items() if key not in about or not is_right(about[key])]
        if lacking or about["first"] > about["ctx"] - 2:
            raise InputError(f"its header is incomplete: {listing(lacking or ['first'])}", where=path, fix=AGAIN)
        kept = cls(path, about)
        kept._check_layout({t.name: (t.dtype, t.shape) for t in stored_tensors(layout, path.name, path)})
        with safe_open(path, "pt") as file:
            arrays = ((name, _bits(file.get_tensor(name))) for name in sorted(layout))
            if digest_of(about, arrays) != about["digest"]:
                raise InputError("was changed: its digest is another", where=path, fix=AGAIN)
        return kept

    def _check_layout(self, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        a = self.about
        computed = _DTYPES[getattr(torch, a["dtype"])]
        windows, ctx, (_, norm) = a["windows"], a["ctx"], found.get("norm", ("", ()))
        hidden = (*norm, 0)[:1]
        wanted = {
            "ids": (("I32",), (windows, ctx)),
            "hidden": ((computed,), (windows, ctx - a["first"], *hidden)),
            "norm": ((computed, "BF16"), hidden),
            "head": ((computed, "BF16"), (a["vocabulary"], *hidden)),
        }
        for layer in range(min(a["layers"], _MOST_LAYERS)):
            _, shape = found.get(f"routes.{layer}", ("", ()))
            if shape:
                wanted[f"routes.{layer}"] = (("U8", "I16"), (windows, ctx, *shape[2:3]))
        for name in (*wanted, *found):
            dtypes, shape = wanted.get(name, ((), ()))
            if name not in found or found[name][0] not in dtypes or found[name][1] != shape:
                raise InputError(f"{name} is not what its header says", where=self.path, fix=AGAIN)

    def check(self, conditions: Mapping[str, Any], ids: np.ndarray, model: str) -> None:
        """Raise InputError where `model`, scored under `conditions` (keys of `about`) on windows `ids` [windows, ctx],
        can't be compared with it: of the windows that it holds, the first are enough."""
        a, where, sha = self.about, self.path, conditions["text"]["sha256"]
        if a["text"]["sha256"] != sha:
            what = f"was scored on {a['text']['source']} (sha256 {a['text']['sha256'][:12]}), this is another text"
            raise InputError(f"{what} (sha256 {sha[:12]})", where=where, fix="score the same text with both")
        for key in ("protocol", "ctx", "dtype"):
            if a[key] != conditions[key]:
                what = f"was scored with --{key} {a[key]}, this run has {conditions[key]}"
                raise InputError(what, where=where, fix=f"give --{key} {a[key]}, or score the reference again")
        if a["decode_path"] != conditions["decode_path"]:
            has = "with" if a["decode_path"] else "without"
            raise InputError(f"was scored {has} --decode-path", where=where, fix="score both alike")
        if a["vocabulary"] != conditions["vocabulary"]:
            what = f"has a vocabulary of {a['vocabulary']}, {model} one of {conditions['vocabulary']}"
            raise InputError(what, where=where, fix="give that of the model it was made from")
        if a["layers"] != conditions["layers"]:
            what = f"is of a model of {a['layers']} layers, {model} has {conditions['layers']}"
            raise InputError(what, where=where, fix="give that of the model it was made from")
        if len(ids) > a["windows"]:
            fix = f"give --limit {a['windows']}, or score the reference again"
            raise InputError(f"holds {a['windows']} windows, this run has {len(ids)}", where=where, fix=fix)
        with safe_open(where, "pt") as file:
            if not np.array_equal(file.get_slice("ids")[: len(ids)].numpy(), ids):
                what = f"has other tokens of the same text than {model}: the tokenizers differ"
                raise InputError(what, where=where, fix="give that of the model it was made from")

    def reference(self, windows: int, device: str) -> Reference:
        """Its first windows, to be compared with on a device. States stay in the file until they are used."""
        a = self.about
        with safe_open(self.path, "pt") as file:
            held = {name: file.get_tensor(name) for name in sorted(file.keys())}
        dtype = held["hidden"].dtype
        norm, head = (held[name].to(device, dtype) for name in ("norm", "head"))
        routes: Routes = [held.get(f"routes.{layer}") for layer in range(a["layers"])]
        passed = Pass(KeptHead(RMSNorm(norm, a["eps"]), head), held["hidden"], routes, a["first"])
        return Reference(a["weights"], passed.part(slice(0, windows)), NoiseFloor(**a["noise_floor"]))


@dataclass(frozen=True)
class HeldReference(KeptReference):
    """One that a process compares several models with: where they fit into HELD bytes, its logits are made once."""

    _made: dict[tuple[int, str], Reference] = field(default_factory=dict, compare=False)

    def reference(self, windows: int, device: str) -> Reference:
        if (windows, device) not in self._made:
            found = super().reference(windows, device)
            if device == "cpu" and self._logits_bytes(windows) <= HELD:
                found = replace(found, held=Held.of(found.passed))
            self._made[windows, device] = found
        return self._made[windows, device]

    def _logits_bytes(self, windows: int) -> int:
        a = self.about
        size: int = windows * (a["ctx"] - 1 - a["first"]) * a["vocabulary"] * getattr(torch, a["dtype"]).itemsize
        return size


def kept_at(model: object) -> KeptReference | None:
    """A kept reference, or that at a path. None where that is of a model: a folder, a GGUF file, a hub id or an opened
    one."""
    if isinstance(model, KeptReference):
        return model
    if not isinstance(model, str | os.PathLike) or not Path(model).is_file() or Path(model).suffix == ".gguf":
        return None
    return KeptReference.opened(Path(model))


def write(path: Path, about: Mapping[str, Any], ids: np.ndarray, head: KeptHead, made: Reference) -> None:
    """Write the file, durably, of a pass over the windows `ids` [windows, ctx]; `about` says under which conditions it
    was made. Raises OSError."""
    states = made.passed.hidden[:, about["first"] :]
    tensors = {"ids": torch.from_numpy(ids).int(), "hidden": states}
    tensors |= {"norm": _narrowed(head.norm.weight), "head": _narrowed(head.weight)}
    for layer, chosen in enumerate(made.passed.routes):
        if chosen is not None:
            tensors[f"routes.{layer}"] = chosen.byte() if int(chosen.max()) < 256 else chosen
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    said = {**about, "weights": made.weights, "noise_floor": asdict(made.noise_floor)}
    said |= {"digest": digest_of(said, ((name, _bits(tensors[name])) for name in sorted(tensors)))}
    write_whole(path, contents(path.name, tensors, {"reference": json.dumps(said, sort_keys=True)}))


def contents(file: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """A safetensors file of tensors, piece by piece, in order of the width of their elements."""
    placed = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    outputs = (Output(name, _DTYPES[t.dtype], tuple(t.shape), t.nbytes) for name, t in placed.items())
    yield Shard(file, tuple(outputs), metadata).header
    for tensor in placed.values():
        rows = max(1, _PIECE * len(tensor) // tensor.nbytes)
        for part in tensor.split(rows):
            yield _bits(part.cpu()).tobytes()


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def _narrowed(weight: torch.Tensor) -> torch.Tensor:
    """In bfloat16 where that loses nothing: a checkpoint's weights are, whatever is computed in."""
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight
