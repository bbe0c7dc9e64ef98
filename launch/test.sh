#!/usr/bin/env bash
# The tests. Arguments go to pytest, paths counted from the repository: launch/test.sh -m slow, launch/test.sh tests/core
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

cd "$root"
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true
echo "test: pytest $*"
exec python -m pytest "$@"
