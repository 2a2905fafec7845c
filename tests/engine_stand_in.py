"""A stand-in for an engine's Python: `stand_in.py DRIVER FOLDER` answers a driver's request with the runtime of this
package, which computes as engines do. `seen(path, model)` makes a program that has an engine, this one or a real one,
read another model than it is asked to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

STAND_IN = Path(__file__)
DRIVERS = STAND_IN.parent.parent / "dsv2quant" / "engines" / "drivers"


def program(path: Path, *, model: Path | None = None, python: str | None = None) -> Path:
    """An executable at `path` to give as --engine-python: the stand-in, or the `python` that has a real engine. It
    reads `model` where that is given."""
    other = "" if model is None else f"'{sys.executable}' '{STAND_IN}' --model '{model}' \"$2\"\n"
    driver = '"$1"' if python else f"'{STAND_IN}'"
    path.write_text(f"#!/bin/sh\n{other}exec '{python or sys.executable}' {driver} \"$2\"\n")
    path.chmod(0o755)
    return path


def main(folder: Path) -> None:
    sys.path[:0] = [str(STAND_IN.parent.parent), str(DRIVERS)]
    import numpy as np
    import torch
    from exchange import Exchange

    from dsv2quant.checkpoint.open import open_checkpoint
    from dsv2quant.model.cache import KV_DTYPES
    from dsv2quant.model.completion import Sampling, generate, prompt_ids
    from dsv2quant.model.load import LoadOptions
    from dsv2quant.model.runtime import Model

    exchange = Exchange(folder)
    checkpoint, request = open_checkpoint(exchange.model), exchange.request
    tokenizer = checkpoint.tokenizer()
    dtype = getattr(torch, request["dtype"])
    model = Model(checkpoint, LoadOptions(dtype, kv_cache=KV_DTYPES.get(request["kv_cache"])))
    if bench := request.get("bench"):
        from dsv2quant.bench.beside import own

        exchange.put("bench", [*own(model, np.load(folder / "bench.npy"), bench["batches"])])
    decoded = []
    for window, row in enumerate(torch.from_numpy(exchange.windows)):
        if not exchange.decode:
            exchange.put_logits(window, model.forward(row[None])[0, exchange.first : -1])
            continue
        caches, rows = model.caches(1, len(row) + exchange.decode), []
        rows.append(model.next_logits(row[None], caches)[0])
        decode = model.decoder(caches)
        while len(rows) < exchange.decode:
            rows.append(decode(rows[-1].argmax()[None])[0])
        decoded.append([int(logits.argmax()) for logits in rows])
        exchange.put_logits(window, torch.stack(rows))
    if exchange.decode:
        exchange.put_decoded(np.array(decoded))
    made = []
    for prompt in exchange.prompts:
        ids = prompt_ids(checkpoint, tokenizer, prompt.get("text") or prompt["messages"])
        stop = checkpoint.stop_ids(tokenizer)
        new = list(generate(model, ids, stop=stop, max_new_tokens=request["max_new_tokens"], sampling=Sampling()))
        reason = "stop" if new[-1] in stop else "length"
        made.append({"prompt_ids": ids, "ids": new, "text": tokenizer.decode(new), "finish_reason": reason})
    exchange.put("generated", made)
    report = {"versions": {"stand-in": "1"}, "kernels": {}, "attention": None, "kv_cache": None, "device": "cpu"}
    exchange.put("report", report)


if __name__ == "__main__":
    if sys.argv[1] == "--model":
        path = Path(sys.argv[3]) / "request.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": sys.argv[2]}))
    else:
        main(Path(sys.argv[1]))
