#!/usr/bin/env bash
# Collects everything that a machine without a network needs, on one that has it: the sources, a wheel
# of each package in .venv (same versions), the small model, and a list of check sums.
#   make model && deploy/bundle.sh /media/express
# Both machines need the same system, Python and kind of device. docs/operations.md: the other side.
set -euo pipefail
out=$(realpath -m "${1:?usage: deploy/bundle.sh FOLDER}")
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
mkdir -p "$out/wheels" "$out/models"

git archive --format=tar.gz --prefix=express-vllm/ --output="$out/express-vllm.tar.gz" HEAD
# The two packages of this repository come with the sources.
"$python" -m pip freeze --all --exclude-editable |
    grep -vE '^(vllm|express-vllm) @ ' > "$out/requirements.txt"
torch=$(grep '^torch==' "$out/requirements.txt")
# As deploy/setup.py: from where pip is configured, or from PyTorch's index.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheels" "$torch" 2> /dev/null ||
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheels" "$torch" \
        --index-url https://download.pytorch.org/whl/cpu
grep -v '^torch==' "$out/requirements.txt" > "$out/others.txt"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheels" --requirement "$out/others.txt"
rm "$out/others.txt"
# For building the two packages.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheels" 'setuptools>=77' wheel
cp -r "$("$python" -m express_vllm.smallmodel)" "$out/models/"
(cd "$out" && sha256sum -- *.gz *.txt wheels/* models/*/* > SHA256SUMS)
du -sh "$out"
