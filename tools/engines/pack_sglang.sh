#!/usr/bin/env bash
# SGLang for a GPU machine without a network, in pieces: see README.md. Needs pip, unzip, xz, 4 GB of disk, nvcc of CUDA 13 and,
# for kernels that SGLang would compile on the GPU machine, up to an hour of one core.
set -euo pipefail

SGLANG=(sglang==0.5.16 sglang-kernel==0.4.5)
# transformers as SGLang pins it: its configurations clash with those of newer ones. FastAPI 0.137 wants OpenTelemetry.
NEEDED=(
  transformers==5.12.1 'tokenizers<=0.23.0,>=0.22.0' apache-tvm-ffi==0.1.11 'compressed-tensors<0.21' fastapi==0.136.3 starlette
  uvicorn python-multipart openai==2.6.1 jiter distro sniffio pydantic==2.14.4 pydantic_core==2.50.5 annotated-types
  typing-inspection msgspec orjson pybase64 pyzmq partial_json_parser setproctitle watchfiles dill interegular loguru gguf
  jsonschema jsonschema-specifications referencing rpds-py
)
# What is not run there: models of pictures and sound, benchmarks, gRPC.
UNUSED=(sglang/multimodal_gen sglang/test sglang/benchmark sglang/eval sglang/srt/grpc sglang/srt/multimodal/_core.cpython-312-x86_64-linux-gnu.so)
# Of sgl_kernel's 1.2 GB: Hopper's ops and FlashMLA. FlashAttention 3 is 1.1 GB, so attention is Triton's; Blackwell's and
# MiniCPM's are left out, too.
UNUSED+=(sgl_kernel/flash_ops.abi3.so sgl_kernel/sm100 'sgl_kernel/infllm_ops*')

download() {  # FOLDER REQUIREMENTS…: wheels for Python 3.12 on any Linux
  local folder=$1 platforms=() glibc
  shift
  for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  for glibc in 2014 2010 1; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
  python3 -m pip download --quiet --dest "$folder" --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" --platform any "$@"
}

stub() {  # MODULE TEXT: what is imported whatever is served, and not called here
  mkdir -p "$work/all/$(dirname "$1")"
  printf '%s\n' "$2" > "$work/all/$1"
}

[ -x "${CUDA_HOME:-}/bin/nvcc" ] || { echo 'set CUDA_HOME to the folder of CUDA 13, which has bin/nvcc' >&2; exit 2; }
here=$(dirname "$(realpath "$0")") dest=$(realpath -m "$1") python=$2 size=${3:-39}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$dest" "$work/all"
download "$work" "${SGLANG[@]}" "${NEEDED[@]}"
for wheel in "$work"/*.whl; do unzip -q -o "$wheel" -d "$work/all"; done
cp -r "$work"/all/*.data/purelib/. "$work"/all/*.data/platlib/. "$work/all/" 2>/dev/null || true
# The interpreter that install_sglang.sh writes says that FlashInfer is not there; its stub is imported all the same.
any='def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return dict'
stub IPython/__init__.py '' && stub IPython/display.py 'HTML = display = None'       # for notebooks
stub flashinfer/__init__.py ''                                                       # 85 MB: sampling is PyTorch's
stub flashinfer/sampling.py 'min_p_sampling_from_probs = top_k_top_p_sampling_from_probs = None'
stub xgrammar/__init__.py "$any"                                                     # 37 MB: no grammars
stub openai_harmony/__init__.py "$any" && stub zstandard/__init__.py ''              # gpt-oss, compressed requests
TVM_FFI_CACHE_DIR="$work/all/compiled" PYTHONPATH="$work/all" SGLANG_IS_FLASHINFER_AVAILABLE=false "$python" "$here/sglang_kernels.py"
find "$work/all/compiled" -type f ! -name '*.so' -delete
rm -f "$dest"/sglang.tar.xz.* "$dest/SHA256SUMS"
tar --create --directory "$work/all" "${UNUSED[@]/#/--exclude=./}" --exclude=__pycache__ . | xz --threads=0 |
  split --bytes="${size}M" --numeric-suffixes - "$dest/sglang.tar.xz."
cd "$dest"
sha256sum sglang.tar.xz.* > SHA256SUMS
du --human-readable --apparent-size sglang.tar.xz.*
