#!/usr/bin/env bash
# Serves a model with vLLM; `make serve` runs this after the set-up. Prints the command it runs.
# Variables: MODEL (a folder, a hub id, or gemma-3-270m; by default the small model), PORT, BACKEND, ARGS;
# CPUINFO (a file instead of /proc/cpuinfo, for tests).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

read -r device _ < .venv/express-setup || true
# ARGS is split as a shell would, so that a JSON argument can be quoted.
eval "more=(${ARGS:-})"
settings=()
arguments=(--attention-backend "${BACKEND:-express}" --port "${PORT:-8000}")
model=${MODEL:-}

if [ -z "$model" ] || [ "$model" = gemma-3-270m ]; then
    model=$(python -m express_vllm.smallmodel $model)
    arguments+=(--served-model-name "$(basename "$model")")
    if [ "$device" = cpu ]; then
        settings+=(VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}")  # GiB
        if [[ " ${more[*]} " != *" --dtype"[\ =]* ]] &&
            ! grep -qwE 'avx512_bf16|amx_bf16|bf16' "${CPUINFO:-/proc/cpuinfo}"; then
            echo "[serve] this CPU has no bfloat16 instructions: adding --dtype float32, more than twice as fast here"
            arguments+=(--dtype float32)
        fi
    fi
fi
if [ -d "$model" ]; then
    settings+=(HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}")
fi
if [ "$device" = cpu ]; then
    # torch.compile on a CPU writes C++ that includes Python.h.
    missing=
    command -v "${CXX:-g++}" clang++ > /dev/null || missing="a C++ compiler (g++)"
    header=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [ -e "$header" ] || missing="${missing:+$missing and }Python's headers (python3-dev)"
    if [ -n "$missing" ]; then
        echo "[serve] torch.compile needs $missing, not found here: adding --enforce-eager"
        arguments+=(--enforce-eager)
    fi
fi

command=(vllm serve "$model" "${arguments[@]}")
echo "[serve] ${settings[*]} ${command[*]} ${ARGS:-}"
echo "[serve] when it has started: http://localhost:${PORT:-8000}/v1"
exec env "${settings[@]}" "${command[@]}" "${more[@]}"
