#!/usr/bin/env bash
# Runs a script as a clan on this host, with one deepspeed launcher per member: a launcher ends all ranks that it
# started when one of them dies, and knows nothing of the others. With clantune.faults.min_members in the config, the
# members that are left go on.
#
#   MEMBERS=4 RANKS=1 launch/members.sh train.py --deepspeed --deepspeed_config ds.json
#
# RANKS are a member's; device m x RANKS and those after it are member m's. Ends with 0 when the run has finished,
# with whatever members; else with the first launcher's own status. On several hosts, with the hosts in a hostfile in
# the order of the members, start on host r what is started here for member r:
#
#   deepspeed --hostfile HOSTS --no_ssh --node_rank r --master_addr FIRST_HOST --master_port PORT train.py ...
set -euo pipefail
command -v deepspeed >/dev/null || source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

members=${MEMBERS:-2} ranks=${RANKS:-1}
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT

# To deepspeed each member is a node: a loopback address with this host's devices, of which it uses its own.
include=
for ((member = 0; member < members; member++)); do
    echo "127.0.0.$((member + 1)) slots=$((members * ranks))" >>"$hosts"
    include+="@127.0.0.$((member + 1)):$(seq -s, $((member * ranks)) $(((member + 1) * ranks - 1)))"
done

launchers=()
for ((member = 0; member < members; member++)); do
    deepspeed --hostfile "$hosts" --include "${include:1}" --no_ssh --node_rank "$member" \
        --master_addr 127.0.0.1 --master_port "$port" "$@" &
    launchers+=($!)
done
trap 'kill "${launchers[@]}" 2>/dev/null || true' INT TERM

is_finished=false first=0
for member in "${!launchers[@]}"; do
    status=0
    wait "${launchers[$member]}" || status=$?
    # A trapped signal ends a wait early.
    while kill -0 "${launchers[$member]}" 2>/dev/null; do
        status=0
        wait "${launchers[$member]}" || status=$?
    done
    if ((status == 0)); then
        is_finished=true
    else
        echo "members.sh: the launcher of member $member ended with status $status" >&2
        ((first != 0)) || first=$status
    fi
done
$is_finished || exit "$first"
