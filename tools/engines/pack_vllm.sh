#!/usr/bin/env bash
# vLLM for a GPU machine without a network, in pieces: see README.md. Needs pip, unzip, xz, 3 GB of disk and some minutes.
set -euo pipefail

VLLM=vllm==0.26.0
# What must not bring its own requirements: xgrammar 0.2.9 wants a newer tvm-ffi than vLLM pins, and 0.2.1 is 44 MB.
PINNED=(xgrammar==0.2.9 apache-tvm-ffi compressed-tensors==0.17.0 depyf==0.20.0 'llguidance<1.8,>=1.7' mistral_common gguf loguru)
NEEDED=(
  cachetools blake3 'fastapi<0.137,>=0.133' 'starlette>=1.0.1' 'openai>=2' 'pydantic>=2.12' pydantic-settings
  'prometheus-fastapi-instrumentator>=8' lm-format-enforcer==0.11.3 outlines_core==0.2.14 lark==1.2.2 partial-json-parser
  'jsonschema>=4.23' 'pyzmq>=25' msgspec watchfiles python-json-logger pybase64 cbor2 ijson setproctitle
  'openai-harmony>=0.0.3' 'anthropic>=0.71' 'model-hosting-container-standards<1,>=0.1.14' mcp 'opentelemetry-sdk>=1.27'
  'opentelemetry-api>=1.27' 'opentelemetry-semantic-conventions-ai>=0.4.1' astor dill pydantic-extra-types pycountry
)
# What the machine's torch and transformers came with: another version would come before theirs.
THERE='setuptools|grpcio|pyyaml|packaging|urllib3|certifi|idna|numpy|torch|click|attrs|charset_normalizer|protobuf'
THERE+='|typing_extensions|anyio|h11|httpcore|httpx|requests|cryptography|cffi|pycparser|pyjwt|supervisor'
# What is not run there.
UNUSED=('*fa2_C*' vllm-rs vllm/third_party/fmha_sm100 '*.cpython-31[0134]*' 'swagger-ui*')

download() {  # FOLDER OPTIONS…: wheels for Python 3.12 on any Linux
  local folder=$1 platforms=() glibc
  shift
  for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  for glibc in 2014 2010 1; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
  python3 -m pip download --quiet --dest "$folder" --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" --platform any "$@"
}

dest=$(realpath -m "$1") size=${2:-50}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$dest" "$work/all/wheels"
download "$work" --no-deps "$VLLM"
unzip -q "$work"/vllm-*.whl -d "$work/all"
download "$work/all/wheels" --no-deps "${PINNED[@]}"
download "$work/all/wheels" "${NEEDED[@]}"
find "$work/all/wheels" -regextype egrep -iregex ".*/($THERE)-[0-9].*" -delete
rm -f "$dest"/vllm.tar.xz.* "$dest/SHA256SUMS"
tar --create --directory "$work/all" "${UNUSED[@]/#/--exclude=}" . | xz --threads=0 |
  split --bytes="${size}M" --numeric-suffixes - "$dest/vllm.tar.xz."
cd "$dest"
sha256sum vllm.tar.xz.* > SHA256SUMS
du --human-readable --apparent-size vllm.tar.xz.*
