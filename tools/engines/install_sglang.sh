#!/usr/bin/env bash
# Unpacks what pack_sglang.sh made: install_sglang.sh STAGE DEST. See README.md.
set -euo pipefail

stage=$(realpath "$1")
mkdir -p "$2"
dest=$(realpath "$2")
(cd "$stage" && sha256sum --quiet --check SHA256SUMS)
cat "$stage"/sglang.tar.xz.* | tar --extract --xz --directory "$dest"
# An interpreter of its own: these packages must come before the machine's, and dsv2quant must not see them.
cat > "$dest/python" <<PYTHON
#!/usr/bin/env bash
export PYTHONPATH="$dest" TVM_FFI_CACHE_DIR="$dest/compiled" SGLANG_IS_FLASHINFER_AVAILABLE=false
exec python3 "\$@"
PYTHON
chmod +x "$dest/python"
