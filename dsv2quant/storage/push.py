"""`push`: a finished artifact into a repository of the hub, through huggingface_hub.

Only files of the manifest are sent, the manifest, the note of what was verified and the pictures that the card shows,
those of the manifest held against their sha256 before the first byte goes out; the card with the repository's name in
its commands. Weights are uploaded one file after the
other, then everything but the card appears in one commit, and the card in the last: what can be seen is whole. A run
that was cut is given again, and sends what the hub does not have yet. A GGUF file can be cut while it is sent
(`push_split.py`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2quant.errors import InputError, listing
from dsv2quant.progress import Progress, no_progress
from dsv2quant.storage.card import MAX_CARD_BYTES, addressed
from dsv2quant.storage.durable import (
    MANIFEST_FILE,
    FileEntry,
    file_entry,
    hash_file,
    hash_together,
    is_regular,
    state_path,
)
from dsv2quant.storage.files import read_bytes
from dsv2quant.storage.gguf_split import Piece
from dsv2quant.storage.hub import heed_quiet
from dsv2quant.storage.hub_errors import hub_errors, persistently
from dsv2quant.storage.manifest import (
    CARD_FILE,
    PICTURES,
    check_regular,
    gguf_manifest,
    is_loaded,
    is_text,
    read_manifest,
)
from dsv2quant.storage.push_split import Content, Room, in_pieces, scratch, whole
from dsv2quant.storage.safetensors import parse_size
from dsv2quant.storage.verified import record_path, recorded

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

logger = logging.getLogger(__name__)
LARGE = 50_000_000_000  # bytes; what is larger is downloaded by hf_xet alone (huggingface_hub/constants.py 2.4)
LARGEST = 500_000_000_000  # of any file (huggingface.co/docs/hub/storage-limits)
_PICTURE = re.compile(rf"\]\(({PICTURES}/\w[\w.-]*\.svg)\)")


@dataclass(frozen=True)
class Pushed:
    """An artifact in a repository: its page, the branch and its last commit; names of files that were `sent`, `nbytes`
    in all, and of those `kept`, which were there already."""

    artifact: str
    repo: str
    url: str
    revision: str
    commit: str
    sent: list[str]
    kept: list[str]
    nbytes: int


def push(
    artifact: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str = "main",
    split: int | str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Pushed:
    """As `api.push`."""
    manifest = _manifest_of(Path(artifact))
    entries: dict[str, dict[str, Any]] = read_manifest(manifest)["files"]
    if not force and not recorded(manifest):
        fix = "`dsv2quant verify` with --source or --engine, or --force to push it as it is"
        raise InputError("nothing says that it was verified", where=artifact, fix=fix)
    with progress(sum(entry["size"] for entry in entries.values()), "B", "checksums") as advance:
        hashed = partial(_checked, manifest.parent)
        found = dict(zip(entries, hash_together(hashed, entries.items(), advance), strict=True))
    added = [path.name for path in (manifest, record_path(manifest)) if is_regular(path)]
    if CARD_FILE not in entries and _is_card(manifest.with_name(CARD_FILE), entries):
        added.append(CARD_FILE)
    card = manifest.with_name(CARD_FILE)
    added += _pictures(card) if CARD_FILE in (*entries, *added) else []
    found |= {name: hash_file(manifest.parent / name) for name in added}
    contents: dict[str, Content] = {name: manifest.parent / name for name in found}
    if CARD_FILE in found:
        contents[CARD_FILE] = addressed(read_bytes(card, MAX_CARD_BYTES), repo)
    cut: dict[str, FileEntry] = {}
    if split is not None:
        contents, cut = in_pieces(manifest, contents, parse_size(str(split)), progress)
    found = {
        name: found[name] if isinstance(content, Path) else cut.get(name) or file_entry(whole(content))
        for name, content in contents.items()
    }
    _check_sizes(artifact, found)

    from huggingface_hub import HfApi

    heed_quiet()
    with hub_errors(repo, None, writes=True):
        api = HfApi()
        if CARD_FILE in found:
            _check_card(api, card, whole(contents[CARD_FILE]))
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision, files_metadata=True)
    if private and not info.private:
        fix = "make it private in its settings, or leave --private out"
        raise InputError("is a public repository", where=repo, fix=fix)
    there = {entry.rfilename: entry for entry in info.siblings}
    if strays := [name for name in there if name not in found and is_loaded(name)]:
        logger.warning("%s also holds %s, which programs may load with the artifact", repo, listing(strays))
    kept = [name for name, entry in found.items() if _is_same(contents[name], entry, there.get(name))]
    sent = [name for name in found if name not in kept]
    with scratch(manifest, [contents[name] for name in sent]) as room:
        commit = _send(api, repo, revision, {name: contents[name] for name in sent}, found, room)
    size = sum(found[name]["size"] for name in sent)
    return Pushed(os.fspath(artifact), repo, str(url), revision, commit or str(info.sha), sent, kept, size)


def _check_sizes(artifact: object, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn of files that few can download; raise InputError for what the hub does not take."""
    fix = "`push --split 45GB` cuts a GGUF file, `convert --max-shard-size` what is in a folder"
    if huge := [name for name, entry in found.items() if entry["size"] > LARGEST]:
        raise InputError(f"{listing(huge)} has more than 500 GB, which the hub doesn't take", where=artifact, fix=fix)
    if large := [name for name, entry in found.items() if entry["size"] > LARGE]:
        logger.warning("%s has more than 50 GB: clients without hf_xet can't download it (%s)", listing(large), fix)


def _manifest_of(path: Path) -> Path:
    """The manifest of a finished artifact. Raises InputError where there is none."""
    manifest = path / MANIFEST_FILE if path.is_dir() else gguf_manifest(path)
    if os.path.lexists(state_path(path)):
        raise InputError("the conversion is unfinished", where=path, fix="run the same `convert` again")
    if not is_regular(manifest):
        fix = "give the folder or the .gguf file that `convert` wrote"
        raise InputError(f"is no artifact of dsv2quant: there is no {manifest.name}", where=path, fix=fix)
    return manifest


def _checked(folder: Path, listed: tuple[str, Mapping[str, Any]], progress: Any) -> dict[str, Any]:
    """{size, sha256} of a file as it is. Raises InputError where it is not as listed; texts may have been edited."""
    name, entry = listed
    check_regular(folder / name, folder)
    found = hash_file(folder / name, progress)
    if found != entry and not is_text(name):
        raise InputError("is not as its manifest has it", where=folder / name, fix="get it again, or convert again")
    return found


def _is_card(path: Path, files: Mapping[str, object]) -> bool:
    """Whether a README.md beside GGUF files, which their manifest does not list, is about them."""
    return is_regular(path) and any(name.encode() in path.read_bytes() for name in files)


def _pictures(card: Path) -> list[str]:
    """The pictures that a card shows and that lie beside it, in their folder."""
    names = dict.fromkeys(_PICTURE.findall(card.read_text(encoding="utf-8-sig", errors="replace")))
    return [name for name in names if is_regular(card.parent / name) and not (card.parent / name).parent.is_symlink()]


def _check_card(api: HfApi, path: Path, card: bytes) -> None:
    """Raise InputError where the hub would not take a card: before the weights are sent, not behind them."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    try:
        content = card.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error}", where=path, fix="the hub takes no other card") from None
    answer = get_session().post(
        f"{api.endpoint}/api/validate-yaml", json={"repoType": "model", "content": content}, headers=build_hf_headers()
    )
    if answer.status_code == 400:
        errors = "; ".join(str(error.get("message")) for error in answer.json()["errors"])
        raise InputError(f"the hub would refuse the card: {errors}", where=path, fix="mend its first lines")
    hf_raise_for_status(answer)


def _is_same(content: Content, entry: Mapping[str, Any], there: Any) -> bool:
    """Whether the hub has a file with this content: by sha256 of a large one, by git's hash of a small one."""
    if there is None or there.size != entry["size"]:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == entry["sha256"])
    found = whole(content)
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(found) + found).hexdigest())


def _send(
    api: HfApi, repo: str, revision: str, contents: Mapping[str, Content], found: Mapping[str, FileEntry], room: Room
) -> str | None:
    """Upload files and make the commits; the last one's name, None where there was nothing to send. Raises InputError
    where a file is no longer what was hashed, as `found` has it."""
    from huggingface_hub import CommitOperationAdd

    adds, commit = {}, None
    for name, content in contents.items():
        adds[name] = add = CommitOperationAdd(name, room(content) if isinstance(content, Piece) else content)
        with hub_errors(repo, None, writes=True):
            upload = partial(api.preupload_lfs_files, repo, [add], revision=revision, free_memory=False, num_threads=1)
            persistently(upload)
        if add.upload_info.sha256.hex() != found[name]["sha256"]:
            where = content if isinstance(content, Path) else name
            raise InputError("changed while it was sent", where=where, fix="verify and push again")
    rest = [add for name, add in adds.items() if name != CARD_FILE]
    card = [add for name, add in adds.items() if name == CARD_FILE]
    for some in filter(None, (rest, card)):
        commit = _commit(api, repo, revision, some)
    return commit


def _commit(api: HfApi, repo: str, revision: str, adds: Sequence[CommitOperationAdd]) -> str:
    what = "the model card" if adds[0].path_in_repo == CARD_FILE else "the artifact"
    with hub_errors(repo, None, writes=True):
        commit = partial(api.create_commit, repo, adds, commit_message=f"dsv2quant: {what}", revision=revision)
        made = persistently(commit)  # one that came twice is the same files again
    return str(made.oid)
