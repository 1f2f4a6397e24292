#!/usr/bin/env bash
# One machine: launch/torchrun.sh PROCESSES COMMAND RUN.yaml [OPTIONS]
# Several machines: on each of them, with its own NODE_RANK,
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh 8 distill run.yaml
# After a rank has died, torchrun starts the ranks again, which resume. MAX_RESTARTS changes how often.
set -euo pipefail
processes=$1
shift
exec torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" -m post_dist "$@"
