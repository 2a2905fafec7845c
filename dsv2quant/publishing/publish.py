"""What people read of a release, and check it by: cards beside the artifacts, report.html and report.json, SHA256SUMS.

None of it depends on when or how fast it was made: a run that was killed leaves the same files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv2quant.planning.plan import Plan
from dsv2quant.publishing.compare import coverage_of
from dsv2quant.publishing.made import Made, Released
from dsv2quant.report.artifacts import Artifact, Report, report_json
from dsv2quant.report.card import CalibratedOn, GgufFile, folder_card, gguf_card
from dsv2quant.report.fallbacks import fallbacks
from dsv2quant.report.origin import origin
from dsv2quant.report.page import page
from dsv2quant.report.pictures import pictures
from dsv2quant.storage.card import write_card
from dsv2quant.storage.durable import MANIFEST_FILE, FileEntry, disk_errors, dump_json, hash_file, write_whole
from dsv2quant.storage.manifest import CARD_FILE, is_text
from dsv2quant.storage.safetensors import read_json

SUMS, RECIPE = "SHA256SUMS", "release.yaml"


def report(released: Released) -> Report:
    """What was measured of a release's artifacts, in its order."""
    return Report(
        released.checkpoint.model, released.checkpoint.revision, tuple(_artifact(made) for made in released.made)
    )


def publish(released: Released, text: str) -> None:
    """Write all of it; `text` is the release's file. A card that a person edited stays. Raises InputError where the
    disk fails."""
    out, found = released.out, report(released)
    _cards(released, text)
    with disk_errors(out):
        write_whole(out / "report.html", [page(found).encode()])
        write_whole(out / "report.json", [dump_json(report_json(found))])
        if text:
            write_whole(out / RECIPE, [text.encode()])
        write_whole(out / SUMS, [_sums(released).encode()])


def _artifact(made: Made) -> Artifact:
    found = made.conversion
    return Artifact(
        made.wanted.name, found.bytes_out, found.bits_per_weight, made.measured, tuple(fallbacks(found.plan)),
        coverage_of(_manifest(made)), made.failed,
    )  # fmt: skip


def _manifest(made: Made) -> Mapping[str, Any]:
    """Of a folder its own, of a GGUF file the one beside it."""
    path = made.path
    return read_json(path / MANIFEST_FILE if path.is_dir() else path.with_name(f"{path.name}.json"))


def _cards(released: Released, text: str) -> None:
    """A card for each folder, and one for all GGUF files, with their pictures."""
    base = origin(released.checkpoint, released.base_model)
    for made in released.made:
        if isinstance(made.conversion.plan, Plan):
            manifest = _manifest(made)
            calibrated = CalibratedOn.of(manifest.get("calibration") or {}, coverage_of(manifest))
            card = folder_card(
                made.conversion.plan, manifest["command"], base, calibrated=calibrated, measured=made.measured,
                figures=_pictures(made.path, [made]), release=text,
            )  # fmt: skip
            write_card(made.path / CARD_FILE, card)
    if into_gguf := [made for made in released.made if made.wanted.into_gguf]:
        files = [
            GgufFile(
                made.conversion.plan, _manifest(made)["command"],
                {name: entry["size"] for name, entry in made.conversion.files.items()}, made.measured,
            )
            for made in into_gguf
        ]  # fmt: skip
        folder = into_gguf[0].path.parent
        write_card(folder / CARD_FILE, gguf_card(files, base, figures=_pictures(folder, into_gguf), release=text))


def _pictures(folder: Path, made: Sequence[Made]) -> dict[str, str]:
    """Draw what the card in a folder shows: {file: title}."""
    drawn = pictures([_artifact(each) for each in made])
    for name, (_, content) in drawn.items():
        with disk_errors(folder):
            (folder / name).parent.mkdir(exist_ok=True)
            write_whole(folder / name, [content.encode()])
    return {name: title for name, (title, _) in drawn.items()}


def _sums(released: Released) -> str:
    """As sha256sum prints them: of all files of a release, what a later run goes on from left out. Those of weights are
    what `convert` found."""
    out, known = released.out, dict[Path, str]()
    for made in released.made:
        folder = made.path if made.path.is_dir() else made.path.parent
        files: Mapping[str, FileEntry] = made.conversion.files
        known |= {folder / name: entry["sha256"] for name, entry in files.items() if not is_text(name)}
    return "".join(f"{known.get(path) or hash_file(path)['sha256']}  {path.relative_to(out)}\n" for path in _files(out))


def _files(out: Path) -> Iterator[Path]:
    for path in sorted(out.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(out).parts)
        if path.is_file() and not hidden and not path.name.startswith(SUMS):  # what a kill left of the sums themselves
            yield path
