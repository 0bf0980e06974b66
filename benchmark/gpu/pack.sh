#!/usr/bin/env bash
# Pack a real vLLM for a GPU machine without network: bash benchmark/gpu/pack.sh. What it packs and how to use it stands in
# ../shared/gpu/README.md; the scripts here are newer than those there, and take their place in .gpu.
set -euo pipefail
cd "$(dirname "$0")/../.."
bash ../shared/gpu/pack_vllm.sh .gpu
cp benchmark/gpu/*.py .gpu/
