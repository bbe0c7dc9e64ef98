#!/usr/bin/env bash
# The main job: four clan members pretrain a byte-level GPT on the CPU through the deepspeed launcher.
# Arguments go to launch/pretrain_gpt.py; results go to clan_runs/ in the current folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
port=$(python -c 'import socket; probe = socket.socket(); probe.bind(("127.0.0.1", 0)); print(probe.getsockname()[1])')
echo "quickstart: 4 members of one rank each, config $root/configs/quickstart.json"
exec deepspeed --num_accelerators 4 --master_port "$port" "$root/launch/pretrain_gpt.py" \
    --deepspeed --deepspeed_config "$root/configs/quickstart.json" "$@"
