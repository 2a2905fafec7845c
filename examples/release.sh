#!/usr/bin/env bash
# A release in a pipeline: everything made, measured and checked, then uploaded. Exit code 4 where a gate failed.
#
#     MODEL=deepseek-ai/DeepSeek-V2-Lite RECIPE=release.yaml OUT=release NAMESPACE=my-org examples/release.sh
#
# Without NAMESPACE nothing is uploaded. A run that was cut off goes on where it was when OUT is kept between jobs.
set -euo pipefail
shopt -s nullglob

dsv2quant release "$MODEL" --recipe "$RECIPE" -o "$OUT" ${DEVICE:+--device "$DEVICE"}
(cd "$OUT" && sha256sum --check --quiet SHA256SUMS)
if [ -n "${NAMESPACE:-}" ]; then
  for artifact in "$OUT"/*/dsv2quant.json; do
    folder=$(dirname "$artifact")
    dsv2quant push "$folder" "$NAMESPACE/$(basename "$folder")" --private
  done
  for file in "$OUT"/*-GGUF/*.gguf; do
    dsv2quant push "$file" "$NAMESPACE/$(basename "$(dirname "$file")")" --private
  done
fi
