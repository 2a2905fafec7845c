"""What a calibrated conversion is made with, and what it leaves: token windows, encoded layers, how each came out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import safe_open

from dsv2quant.arch.config import ModelConfig
from dsv2quant.calib.distributed import Ranks
from dsv2quant.calib.statistics import Statistics, kv_scales
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.formats.codec import Inputs
from dsv2quant.planning import options
from dsv2quant.planning.consumers import input_group
from dsv2quant.planning.plan import Entry, Plan
from dsv2quant.planning.recipe import CALIBRATED
from dsv2quant.planning.smoothing import Smoothing
from dsv2quant.progress import Progress
from dsv2quant.text.calibration import MAX_OVERLAP, fingerprint, load, overlap, windows, windows_in_order
from dsv2quant.text.dataset import named
from dsv2quant.text.text import StrPath, python_topics
from dsv2quant.text.tokenizer import Protocol

if TYPE_CHECKING:
    from dsv2quant.planning.gguf_plan import GgufPlan

logger = logging.getLogger(__name__)
LEAST_TUNED = 16  # windows: of as many, one is held out
MOMENT_BYTES = 8 << 30  # experts are calibrated in batches that fit into this, on inputs that do
ROWS = 8192  # tokens that go through a layer at once
LANES = 32  # parts of the tokens, at most, whose sums are added up in a tree: as many ranks can share them
TURNS = 16  # batches of experts at least, where there are as many experts, for as many ranks to share


@dataclass(frozen=True)
class Calibration:
    """Token windows [windows, ctx] (int64), where they come from, and the fingerprint of their text."""

    ids: np.ndarray
    source: str
    text_sha256: str
    seed: int
    fingerprint: list[int]

    def describe(self, device: str) -> dict[str, Any]:
        """What the manifest says of it; two runs with equal descriptions choose the same codes."""
        from importlib.metadata import version

        return {
            "source": self.source,
            "text_sha256": self.text_sha256,
            "tokens_sha256": hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest(),
            "windows": len(self.ids),
            "ctx": int(self.ids.shape[1]),
            "seed": self.seed,
            "device": device.partition(":")[0],
            "torch": version("torch"),
        }


def window_length(checkpoint: Checkpoint, length: int | None = None, protocol: Protocol = "default") -> int:
    """Tokens of a window, where it is not said the context that the model was trained for, at most 2048, of llama.cpp's
    protocol 512."""
    return length or min(512 if protocol == "llama.cpp" else 2048, checkpoint.config.trained_context)


def read_calibration(
    checkpoint: Checkpoint,
    text: StrPath | None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    protocol: Protocol = "default",
    cache_dir: StrPath | None = None,
    offline: bool = False,
) -> Calibration:
    """`samples` (512) windows of `length` tokens of a text file, a data set of the hub (`cache_dir` and `offline` as of
    models), or the default text; `seed` (0) shuffles it, `window_length` says the length's default.

    Raises InputError for a source that is not converted, and as `load` and the tokenizer do, and UsageError for a data
    set by llama.cpp's protocol. Warns of the default text, of one that is short of windows, and of one that is scored
    by default.
    """
    folder = checkpoint.as_source().downloaded
    samples, seed = samples or 512, seed or 0
    length = window_length(checkpoint, length, protocol)
    if protocol == "llama.cpp" and text is not None and named(os.fspath(text)) is not None:
        raise UsageError("--protocol llama.cpp needs --calibration FILE, a plain text file")
    found = load(text, folder, cache_dir, offline)
    tokenizer = checkpoint.tokenizer()
    if protocol == "llama.cpp":
        ids = windows_in_order(found, tokenizer, samples, length)
    else:
        ids = windows(found, tokenizer, samples, length, seed)
    tokenizer.check_ids(ids, checkpoint.config.vocab_size)
    sketch = fingerprint("\n".join(document.text for document in found.documents))
    if text is None:
        logger.warning("no --calibration: using %s; text like what the model will see is better", found.source)
    if len(ids) < samples:
        logger.warning("warning: %s fills %d of %d windows of %d tokens", found.source, len(ids), samples, length)
    if (shared := overlap(fingerprint(python_topics().content), sketch)) > MAX_OVERLAP:
        logger.warning("warning: %s of the text that eval-ppl scores by default is in it", f"{shared:.1%}")
    return Calibration(ids, found.source, found.sha256, seed, sketch)


@dataclass(frozen=True)
class Outcome:
    """What became of one matrix: tokens it was fitted on; relative output error ‖(W − Q) x‖² / ‖W x‖² of its codes and
    of plain rounding's, on the windows held out; whether plain rounding won there."""

    module: str
    role: str
    tokens: int
    error: float
    rtn_error: float
    kept_rtn: bool


@dataclass(frozen=True)
class Tuned:
    """What tuning left: parts {suffix: array} that are stored in place of others, by the weight's name, none where it
    was not taken; and what the manifest says of it."""

    parts: dict[str, dict[str, np.ndarray]]
    about: dict[str, Any]


class Tuning(NamedTuple):
    """What an artifact is tuned on: so many tokens of a text, which is gone over again where it is shorter."""

    text: Calibration
    tokens: int

    @property
    def windows(self) -> int:
        """Windows that are trained on, over and over, and held out."""
        return self.tokens // self.text.ids.shape[1]

    def describe(self, device: str) -> dict[str, Any]:
        """What the manifest says of it."""
        return self.text.describe(device) | {"tokens": self.tokens}


def needs_calibration(plan: Plan) -> bool:
    """Whether any tensor's method needs calibration."""
    return any(entry.method in CALIBRATED for entry in plan.entries)


def used_by(plan: Plan | GgufPlan, given: Mapping[str, Any], calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Of options of a calibration those that a conversion has a use for: all where it calibrates, its text where it is
    tuned alone. `given` are the conversion's own."""
    if isinstance(plan, Plan) and needs_calibration(plan):
        return dict(calibration)
    return {name: value for name, value in calibration.items() if name != "samples"} if "tune" in given else {}


def needs_statistics(plan: Plan) -> bool:
    """Whether any tensor's method or scheme needs statistics."""
    return any(entry.needs_inputs or entry.kv_scales for entry in plan.entries)


def calibrates(plan: Plan | GgufPlan, is_measured: bool = False) -> bool:
    """Whether a conversion runs the model on calibration text. Statistics that were measured before save a pass."""
    return isinstance(plan, Plan) and (needs_calibration(plan) or (needs_statistics(plan) and not is_measured))


def check_ranks(plan: Plan | GgufPlan, statistics: Statistics | None, ranks: Ranks) -> None:
    """Raise UsageError where several ranks would have nothing to do together."""
    if ranks.size > 1 and not calibrates(plan, statistics is not None):
        what = f"{ranks.size} ranks share out what is calibrated, and nothing of this recipe calibrates here"
        raise UsageError(what, fix="run it without torchrun")


def work_weights(plan: Plan, layers: range | None = None) -> int:
    """Weights whose codes calibration chooses, of some layers or all: what progress counts."""
    chosen = (entry.spec for entry in plan.entries if entry.method in CALIBRATED)
    return sum(spec.size for spec in chosen if layers is None or spec.layer in layers)


def work_bytes(plan: Plan, calibration: Calibration) -> int:
    """Disk that the work folder takes at most: encoded matrices, three streams of hidden states, where neither the
    device nor memory has room for them, and two snapshots of two."""
    encoded = sum(entry.nbytes for entry in plan.entries if entry.method in CALIBRATED)
    return encoded + (3 + 2 * 2) * 4 * calibration.ids.size * plan.checkpoint.config.hidden_size


def tuning_bytes(checkpoint: Checkpoint, tuning: Tuning) -> int:
    """Disk that tuning takes at most: the unquantized model's hidden states before and behind a layer, and two
    snapshots of what is trained, 6 bytes for each weight."""
    weights = sum(weight.spec.size for weight in checkpoint.weights)
    return 2 * 4 * tuning.text.ids.size * checkpoint.config.hidden_size + 2 * 6 * weights


def work_memory(plan: Plan) -> int:
    """Memory that calibration takes at most beside hidden states: the widest layer in float32, what attention makes of
    a batch of tokens in both models, and either the moments of a matrix, added up lane by lane, or those of a batch of
    experts with their tokens."""
    layers: dict[int, int] = defaultdict(int)
    for entry in plan.entries:
        if entry.spec.layer is not None:
            layers[entry.spec.layer] += 4 * entry.spec.size
    c = plan.checkpoint.config
    calibrated = [entry.spec for entry in plan.entries if entry.method in CALIBRATED]
    single = [max(lane_bytes(x.shape[1]), matrix_bytes(x.shape[1], x.shape[0])) for x in calibrated if x.expert is None]
    experts = any(x.expert is not None for x in calibrated)
    together = expert_bytes(c) * max(1, min(MOMENT_BYTES // expert_bytes(c), c.n_routed_experts // TURNS))
    return max(layers.values()) + batch_bytes(c) + max(*single, experts * (together + MOMENT_BYTES), 0)


def batch_bytes(config: ModelConfig) -> int:
    """Memory for what attention makes of a batch of tokens in both models."""
    return 2 * 4 * ROWS * config.num_attention_heads * 3 * (config.qk_head_dim + config.v_head_dim)


def lane_bytes(columns: int) -> int:
    """Memory for a matrix's moments while they are added up: H and S of all tokens and of those held out, in float32,
    of a lane and of each level of the tree."""
    return (LANES.bit_length() + 1) * 2 * 2 * 4 * columns**2


def expert_bytes(config: ModelConfig) -> int:
    """Memory to calibrate one routed expert's gate and up, which takes more than its down."""
    return matrix_bytes(config.hidden_size, config.moe_intermediate_size)


def matrix_bytes(columns: int, rows: int) -> int:
    """Memory to calibrate a matrix: H and S of the tokens to fit on and of those held out, as summed and shrunk, in
    float32; six steps of the factorisation in float64; and a dozen float32 matrices of the weight's own size."""
    return (2 * 4 * 4 + 6 * 8) * columns**2 + 12 * 4 * rows * columns


def layer_file(folder: Path, layer: int) -> Path:
    """Where the work folder keeps a finished layer."""
    return folder / f"layer-{layer:05d}.safetensors"


class Encoded:
    """The tensors that calibration encoded, on disk, and how each matrix came out."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._file_of: dict[str, Any] = {}
        self.outcomes: list[Outcome] = []
        for layer in range(layers):
            file = safe_open(layer_file(folder, layer), "np")
            self._file_of |= dict.fromkeys(file.keys(), file)
            self.outcomes += [Outcome(**outcome) for outcome in json.loads(file.metadata()["about"])]

    def part(self, name: str) -> np.ndarray:
        """The bits of an encoded tensor."""
        found: np.ndarray = self._file_of[name].get_tensor(name)
        return found


class Prepared:
    """Use `inputs` for what a codec is given beside a weight that `smoothing` scaled, and `kv_scales`; `encoded` holds
    what needs no codec any more."""

    def __init__(
        self,
        plan: Plan,
        statistics: Statistics | None = None,
        smoothing: Smoothing | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        self.statistics, self.smoothing, self.encoded = statistics, smoothing or Smoothing({}), encoded
        self._plan = plan
        self._amax: dict[str, float] = defaultdict(float)  # by group of tensors that share an input scale
        for entry in plan.entries:
            if statistics is not None and entry.needs_inputs:
                amax, columns = statistics.amax(entry.spec), self.smoothing.columns(entry.spec)
                largest = float((amax if columns is None else np.ldexp(amax, -columns)).max())
                self._amax[self._group(entry)] = max(largest, self._amax[self._group(entry)])

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each matrix that is encoded already."""
        return self.encoded.outcomes if self.encoded is not None else []

    def encoded_parts(self, entry: Entry) -> dict[str, np.ndarray]:
        """The parts of a matrix that is encoded already, by name."""
        assert self.encoded is not None
        suffixes = {o.name: o.name.removeprefix(entry.module) for o in entry.outputs if o not in entry.kv_scales}
        return {name: self.encoded.part(f"{entry.spec.module}{suffix}") for name, suffix in suffixes.items()}

    def inputs(self, entry: Entry) -> Inputs:
        """What the inputs of a weight that needs them were in calibration, behind the smoothing. The largest magnitude
        is that of all that must share an input scale."""
        assert self.statistics is not None
        importance, columns = self.statistics.mean_square(entry.spec), self.smoothing.columns(entry.spec)
        if columns is not None:
            importance = np.ldexp(importance, -2 * columns)
        return Inputs(importance, self._amax[self._group(entry)])

    def kv_scales(self, entry: Entry) -> dict[str, np.ndarray]:
        """The values of `entry.kv_scales` by name: of a latent cache one for keys and values."""
        if not entry.kv_scales:
            return {}
        assert self.statistics is not None
        assert entry.spec.layer is not None
        ranges = self.statistics.kv_ranges(entry.spec.layer)
        scales = kv_scales(*ranges, is_mla=self._plan.checkpoint.config.is_mla)
        return {
            output.name: np.full(output.shape, scale, np.float32)
            for output, scale in zip(entry.kv_scales, scales, strict=True)
        }

    def _group(self, entry: Entry) -> str:
        return input_group(entry.spec, self._plan.targets)


class Used(NamedTuple):
    """What a plan is calibrated on, statistics that are given, what it is tuned on, and all of it as options."""

    calibration: Calibration | None
    statistics: Statistics | None
    tuning: Tuning | None
    words: list[str]


def calibrated_on(plan: Plan, given: Mapping[str, Any], progress: Progress) -> Used:
    """What a plan is calibrated and tuned on, as far as it is: both on the first windows of the same ones. Raises
    UsageError for options that nothing uses, and for fewer tokens than tuning can have."""
    options.check_tune(plan.schemes, given)
    if "statistics" in given and not needs_statistics(plan):
        raise UsageError("--statistics: no method of this recipe uses them; gptq calibrates by itself")
    runs = calibrates(plan, "statistics" in given)
    idle = [] if runs else [name for name in ("samples", "figure") if name in given]
    if not runs and "tune" not in given:
        idle = [name for name in options.CALIBRATION if name in given]
    if idle:
        raise UsageError(f"{options.spelled(idle[0], given)}: nothing of this recipe calibrates here")
    words = []
    calibration, tuning = None, None
    if runs or "tune" in given:
        samples = (given.get("samples") or 512) if runs else 0
        found, tuning = _read_for(plan.checkpoint, samples, given, progress)
        words += [f"--calibration {found.source}"] * ("calibration" in given)
        if runs:
            calibration = replace(found, ids=found.ids[:samples])
            words.append(f"--num-calibration-samples {samples}")
        words.append(f"--max-seq-length {found.ids.shape[1]} --seed {found.seed}")
    statistics = Statistics(Path(given["statistics"])) if "statistics" in given else None
    if statistics is not None:
        words.append(f"--statistics {statistics.path.name}")
    return Used(calibration, statistics, tuning, words)


def tuned_on(checkpoint: Checkpoint, given: Mapping[str, Any], progress: Progress) -> Used:
    """What a GGUF file is tuned on. Raises UsageError for fewer tokens than tuning can have."""
    found, tuning = _read_for(checkpoint, 0, given, progress)
    words = [f"--calibration {found.source}"] * ("calibration" in given)
    return Used(None, None, tuning, [*words, f"--max-seq-length {found.ids.shape[1]} --seed {found.seed}"])


def _read_for(
    checkpoint: Checkpoint, samples: int, given: Mapping[str, Any], progress: Progress
) -> tuple[Calibration, Tuning | None]:
    """Windows for calibration on `samples` of them, and for tuning where it is asked for."""
    length = window_length(checkpoint, given.get("length"))
    tokens = options.parse_tokens(given["tune"]) if "tune" in given else 0
    with progress(0, "", "tokenize"):
        found = read_calibration(
            checkpoint, given.get("calibration"), max(samples, tokens // length), length, given.get("seed"),
            cache_dir=given.get("cache_dir"), offline=given.get("offline", False),
        )  # fmt: skip
    if "tune" not in given:
        return found, None
    text = replace(found, ids=found.ids[: tokens // length])
    if len(text.ids) < LEAST_TUNED:
        what = f"--tune {given['tune']}: {len(text.ids)} windows of {length} tokens, too few to hold one out"
        raise UsageError(what, fix="tune on more tokens, or give a longer text")
    return found, Tuning(text, tokens)
