#!/bin/bash
# A sweep on Slurm: Ray's head on the first node of the allocation, a worker on every other, the driver beside the head.
#   sbatch deploy/slurm.sh SWEEP.yaml [options of `safecl run`]
# `safecl` must be on PATH on every node, the same installation (one environment or image). The store must be a place that
# every node reaches: execution.root, a shared folder or a URL. The same command continues after the time limit: before it,
# Slurm sends SIGTERM (--signal), upon which training saves its checkpoints.
#SBATCH --job-name=safecl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --output=safecl-%j.log
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch deploy/slurm.sh SWEEP.yaml [options of 'safecl run']" >&2
    exit 2
fi
: "${SLURM_JOB_ID:?is not set: start this with sbatch}" "${SLURM_JOB_NODELIST:?is not set: start this with sbatch}"

PORT=${SAFECL_RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # two jobs may share a node's network
CPUS=${SLURM_CPUS_PER_TASK:-1}
GPUS=${SLURM_GPUS_ON_NODE:-0}
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES[0]}
HEAD_IP=$(srun --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname -I | awk '{print $1}')

# Only who knows the token gets into the cluster. It lies where only this user can read it, on a disk that all nodes share.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${SAFECL_TOKEN:-$HOME/.safecl-token-$SLURM_JOB_ID}
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
export RAY_USAGE_STATS_ENABLED=0

started=()
driver=
stop() {
    trap - EXIT TERM INT
    if [ -n "$driver" ]; then
        kill -TERM "$driver" 2>/dev/null || true
        wait "$driver" || true
    fi
    for step in "${started[@]}"; do
        kill -TERM "$step" 2>/dev/null || true
    done
    wait || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap stop EXIT
trap 'stop; exit 143' TERM INT

# Ray's parts wait 30 s for each other, which a busy node or file system may need more than once.
RAY='for tries in 1 2 3; do
    ray start "$@" --block & ray=$!
    trap "kill -TERM $ray; wait $ray; exit 143" TERM
    wait $ray && exit 0
    sleep 5
done
exit 1'

on_node() { # NODE, then options of `ray start`
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
        bash -c "$RAY" ray "$@" --num-cpus="$CPUS" --num-gpus="$GPUS" --disable-usage-stats &
    started+=($!)
}

on_node "$HEAD" --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false
for ((i = 1; i < ${#NODES[@]}; i++)); do
    on_node "${NODES[i]}" --address="$HEAD_IP:$PORT"
done

for ((tries = 0; ; tries++)); do
    for step in "${started[@]}"; do
        kill -0 "$step" 2>/dev/null || { echo "a node's Ray has ended: see above" >&2; exit 1; }
    done
    there=$(python - "$HEAD_IP:$PORT" <<'PYTHON' || true
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
PYTHON
    )
    [ "${there:-0}" = "${#NODES[@]}" ] && break
    [ "$tries" -ge 60 ] && { echo "only ${there:-0} of ${#NODES[@]} nodes came within time" >&2; exit 1; }
    sleep 5
done

use_gpu=false
[ "$GPUS" -gt 0 ] && use_gpu=true
safecl run "$1" --set "execution.address=$HEAD_IP:$PORT" --set execution.use_gpu=$use_gpu "${@:2}" &
driver=$!
code=0
wait "$driver" || code=$?
driver=
exit "$code"
