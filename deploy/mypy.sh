#!/usr/bin/env bash
# Type-checks everything under its import name. mypy does not know that backend/ and scheduler/ are
# express_vllm.backend and express_vllm.scheduler, so it is shown a folder of links where they are.
set -euo pipefail
cd "$(dirname "$0")/.."
links=.mypy_cache/packages
rm -rf "$links"
mkdir -p "$links/express_vllm"
ln -s "$PWD"/express_vllm/* "$PWD/backend" "$PWD/scheduler" "$links/express_vllm/"
MYPYPATH=$links .venv/bin/mypy --no-error-summary -p express_vllm "$@" |
    sed -e "s#^$links/express_vllm/\(backend\|scheduler\)/#\1/#" -e "s#^$links/##"
echo "types: no errors"
