"""Hub ids: download a checkpoint, or read only its headers, through huggingface_hub.

Only safetensors, JSON and text files are ever fetched: no pickle, no remote code. Of the weights only those that the
model is made of are: repositories also hold other formats and precisions of them.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dsv2quant.errors import InputError, UsageError, listing
from dsv2quant.storage.hub_errors import hub_errors, near
from dsv2quant.storage.safetensors import INDEX_FILE, SINGLE_FILE, indexed_shards, read_json
from dsv2quant.storage.stream import Remote, Stream

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
# What `convert` reads or copies beside the weights. README.md carries the licence of the base model.
_ROOT = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "LICENSE*")
_TEMPLATES = "additional_chat_templates/*.jinja"
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
_SITES = ("huggingface.co", "www.huggingface.co", "hf.co")


def identify(model: str, revision: str | None) -> tuple[str, str | None]:
    """(owner/name, revision) of `owner/name`, `owner/name@REVISION`, or the address of its page on the hub.

    Raises InputError for anything else, and UsageError for two revisions.
    """
    named = _of_address(model) if "://" in model else model
    match = _ID.fullmatch(named)
    if match is None:
        fix = near(model) or "give a checkpoint's folder or a hub id, owner/name or owner/name@REVISION"
        raise InputError("no such folder", where=model, fix=fix)
    if match[2] and revision and match[2] != revision:
        raise UsageError(f"{model} and --revision {revision} name two revisions", fix="give one")
    return match[1], match[2] or revision


def _of_address(address: str) -> str:
    """The hub id behind the address of a model's page, or of its file list at a revision."""
    elsewhere = InputError(
        "is a web address, not of the hub", where=address, fix="give a folder or a hub id, owner/name"
    )
    try:
        url = urlsplit(address)
        site = url.hostname
    except ValueError:
        raise elsewhere from None
    if url.scheme not in ("http", "https") or site not in _SITES:
        raise elsewhere
    parts = url.path.strip("/").split("/")
    if parts[0] in ("datasets", "spaces") or len(parts) < 2:
        raise InputError("is no model's address", where=address, fix="give a hub id, owner/name")
    repo = "/".join(parts[:2])
    if len(parts) == 2:
        return repo
    revision = unquote(parts[3]) if parts[2] in ("tree", "blob", "resolve") and len(parts) > 3 else None
    if parts[2] == "tree" and len(parts) == 4:
        return f"{repo}@{revision}"
    fix = f"give {repo}" + (f" or {repo}@{revision}" if revision else "")
    raise InputError("is the address of a part of a model", where=address, fix=fix)


def is_offline(offline: bool) -> bool:
    """Whether only the cache may be used: by --offline, or by HF_HUB_OFFLINE, which huggingface_hub reads."""
    from huggingface_hub import constants

    return offline or constants.HF_HUB_OFFLINE


def download(repo: str, revision: str | None, cache_dir: str | None, offline: bool) -> tuple[Path, str]:
    """(folder of the snapshot, resolved commit). With `offline`, only what the cache already holds."""
    from huggingface_hub import HfApi, snapshot_download

    heed_quiet()
    if is_offline(offline):
        folder = _cached(repo, revision, cache_dir)
    else:
        with hub_errors(repo, cache_dir):
            api = HfApi()
            commit, names = _list(api, repo, revision)
            shards = _shards(repo, names, partial(api.hf_hub_download, repo, revision=commit, cache_dir=cache_dir))
            small = [name for name in names if _is_small(name)]
            wanted = [glob.escape(name) for name in (*small, *shards)]
            # By its branch, not the commit: the cache then knows the branch when offline.
            folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=wanted))
    # The cache names a snapshot's folder after its commit.
    return folder, folder.name


def read_headers(
    repo: str, revision: str | None, cache_dir: str | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """(config.json, {shard: {tensor: {dtype, shape, data_offsets}}}, resolved commit), without downloading weights."""
    from huggingface_hub import HfApi

    heed_quiet()
    with hub_errors(repo, cache_dir):
        api = HfApi()
        commit, names = _list(api, repo, revision)
        fetch = partial(api.hf_hub_download, repo, revision=commit, cache_dir=cache_dir)
        config, shards = Path(fetch("config.json")), _shards(repo, names, fetch)
        with ThreadPoolExecutor(16) as pool:
            read = pool.map(lambda file: api.parse_safetensors_file_metadata(repo, file, revision=commit), shards)
            headers = {
                file: {
                    name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
                    for name, t in header.tensors.items()
                }
                for file, header in zip(shards, read, strict=True)
            }
    return read_json(config), headers, commit


def stream(repo: str, revision: str | None, cache_dir: str | None, out: Path) -> tuple[Path, Stream]:
    """(folder with what lies beside the weights, its shards, which come to lie in folder `out` one by one)."""
    from huggingface_hub import HfApi, snapshot_download

    _, headers, commit = read_headers(repo, revision, cache_dir)
    with hub_errors(repo, cache_dir):
        info = HfApi().model_info(repo, revision=commit, files_metadata=True)
        found = {entry.rfilename: entry for entry in info.siblings}
        small = [glob.escape(name) for name in found if _is_small(name)]
        folder = Path(snapshot_download(repo, revision=commit, cache_dir=cache_dir, allow_patterns=small))
        files = {
            name: Remote(entry.size, entry.lfs.sha256 if entry.lfs is not None else None, entry.blob_id)
            for name, entry in ((name, found[name]) for name in headers)
        }
    return folder, Stream(repo, commit, out, files, headers)


def heed_quiet() -> None:
    """Keep huggingface_hub's own bars down where warnings are."""
    from huggingface_hub.utils import disable_progress_bars

    if not logger.isEnabledFor(logging.WARNING):
        disable_progress_bars()


def _list(api: HfApi, repo: str, revision: str | None) -> tuple[str, list[str]]:
    """(resolved commit, names of its files)."""
    info = api.model_info(repo, revision=revision)
    return str(info.sha), [entry.rfilename for entry in info.siblings]


def _is_small(name: str) -> bool:
    """Whether a file is read or copied beside the weights. (fnmatch's * also matches a slash.)"""
    if "/" in name:
        return fnmatch.fnmatchcase(name, _TEMPLATES)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _ROOT)


def _shards(repo: str, names: Collection[str], fetch: Callable[[str], str]) -> list[str]:
    """The safetensors files that make up the model: those of the index, where there is one. `fetch` downloads a file,
    and returns its path."""
    if INDEX_FILE not in names:
        if SINGLE_FILE not in names:
            fix = "only safetensors checkpoints are read, never pickle"
            raise InputError(f"no {SINGLE_FILE} and no index", where=repo, fix=fix)
        return [SINGLE_FILE]
    shards = indexed_shards(Path(fetch(INDEX_FILE)).parent)
    if missing := [file for file in shards if file not in names]:
        what = f"the hub lacks {listing(missing)}, which its index names"
        raise InputError(what, where=repo, fix="take another revision, or tell the model's owner")
    if SINGLE_FILE in names and SINGLE_FILE not in shards:
        what = f"holds {SINGLE_FILE} beside {listing(shards, 1)}, which its index names"
        raise InputError(
            what, where=repo, fix="two sets of weights: download the right one into a folder and give that"
        )
    return shards


def _cached(repo: str, revision: str | None, cache_dir: str | None) -> Path:
    """The snapshot that the cache holds. Raises InputError where it holds none, or only a part."""
    from huggingface_hub import errors, snapshot_download

    again = "run once online, without --offline and HF_HUB_OFFLINE"
    with hub_errors(repo, cache_dir):
        try:
            folder = Path(
                snapshot_download(
                    repo, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns="config.json"
                )
            )
        except errors.LocalEntryNotFoundError:
            raise InputError("not in the local cache", where=repo, fix=near(repo) or again) from None
    shards = indexed_shards(folder) if (folder / INDEX_FILE).exists() else [SINGLE_FILE]
    if missing := [file for file in ("config.json", *shards) if not (folder / file).exists()]:
        raise InputError(f"the local cache lacks {listing(missing)} of it", where=repo, fix=again)
    return folder
