#!/usr/bin/env bash
# Unpacks what pack_vllm.sh made: install_vllm.sh STAGE DEST. See README.md.
set -euo pipefail

stage=$(realpath "$1")
mkdir -p "$2"
(cd "$stage" && sha256sum --quiet --check SHA256SUMS)
cat "$stage"/vllm.tar.xz.* | tar --extract --xz --directory "$2"
python3 -m pip install --quiet --no-index --no-deps --target "$2" "$2"/wheels/*.whl
rm -r "$2/wheels"
