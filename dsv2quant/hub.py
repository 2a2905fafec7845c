"""Hub ids: download a checkpoint, or read only its headers, through huggingface_hub.

Only safetensors, JSON and text files are ever fetched: no pickle, no remote code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError

# What `convert` reads or copies. README.md carries the licence of the base model.
ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "LICENSE*"]
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_repo_id(model: str) -> bool:
    """Whether `model` is spelled like a hub id, `owner/name`."""
    return _REPO_ID.fullmatch(model) is not None


def download(model: str, revision: str | None, cache_dir: str | None, offline: bool) -> tuple[Path, str]:
    """(folder of the snapshot, resolved commit). With `offline`, only what the cache already holds."""
    from huggingface_hub import snapshot_download

    with _hub_errors(model, offline):
        folder = snapshot_download(
            model,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=ALLOW_PATTERNS,
        )
    # The cache names a snapshot's folder after its commit.
    return Path(folder), Path(folder).name


def read_headers(
    model: str, revision: str | None, cache_dir: str | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """(config.json, {shard: {tensor: {dtype, shape, data_offsets}}}, resolved commit), without downloading weights."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(model, offline=False):
        commit = str(api.model_info(model, revision=revision).sha)
        config = Path(api.hf_hub_download(model, "config.json", revision=commit, cache_dir=cache_dir))
        metadata = api.get_safetensors_metadata(model, revision=commit)
    headers = {
        file: {
            name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
            for name, t in shard.tensors.items()
        }
        for file, shard in metadata.files_metadata.items()
    }
    return json.loads(config.read_text(encoding="utf-8")), headers, commit


@contextmanager
def _hub_errors(model: str, offline: bool) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError("the hub refuses access", where=model, fix="accept its licence and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        fix = "check the spelling, or set HF_TOKEN for a private one; a local folder must exist"
        raise InputError("no such model on the hub and no such folder", where=model, fix=fix) from None
    except errors.RevisionNotFoundError:
        raise InputError("no such revision", where=model, fix="give a branch, tag or commit of the model") from None
    except errors.NotASafetensorsRepoError:
        fix = "only safetensors checkpoints are read, never pickle"
        raise InputError("no model.safetensors and no index", where=model, fix=fix) from None
    except errors.SafetensorsParsingError as error:
        raise InputError(f"a safetensors header can't be parsed: {error}", where=model) from None
    except errors.EntryNotFoundError as error:
        if offline:
            raise InputError("not in the local cache", where=model, fix="run once without --offline") from None
        raise InputError(f"the hub has no such file: {error}", where=model) from None
    # errors.HTTPError is the client library's own base class: httpx in huggingface_hub 1, httpx2 in 2.
    except (errors.HTTPError, errors.HFValidationError, ConnectionError) as error:
        raise InputError(f"the hub can't be reached: {error}", where=model, fix="retry, or use --offline") from None
