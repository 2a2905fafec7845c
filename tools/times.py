"""What GPTQ takes on DeepSeek-V2 and R1: the tables of docs/scale.md, as `dsv2quant plan MODEL --int4 --time` has them.

    python tools/times.py      prints them

All of it comes of plans, made from headers of the published shapes: no weight is read.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from family_configs import V2, V3, Config  # noqa: E402

import dsv2quant as dq  # noqa: E402
from dsv2quant.planning.plan import Plan  # noqa: E402
from dsv2quant.report.forecast import forecast_text  # noqa: E402

MODELS = {"DeepSeek-V2": V2, "DeepSeek-R1": V3}
STORED = "quantization_config"


def headers(folder: Path, config: Config) -> Path:
    """A checkpoint that is headers and holes, in BF16, or where its configuration says so in FP8 blocks."""
    if STORED not in config:
        return tiny.write_headers(folder, config)
    plain = {key: value for key, value in config.items() if key != STORED}
    plan = dq.plan(tiny.write_headers(folder / "bf16", plain), scheme="fp8-block")
    assert isinstance(plan, Plan)
    for shard in plan.shards:
        with (folder / shard.file).open("wb") as out:
            out.write(shard.header)
            out.truncate(shard.nbytes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps(plan.index()))
    return folder


def table(folder: Path, model: str) -> list[str]:
    """The lines that the command prints of a model."""
    plan = dq.plan(headers(folder / model, MODELS[model]), scheme="int4-mixed")
    assert isinstance(plan, Plan)
    return forecast_text(dq.forecast(plan)).splitlines()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            print("```", *table(Path(folder), model), "```", "", sep="\n")


if __name__ == "__main__":
    main()
