#!/usr/bin/env bash
# One machine, with the deepspeed launcher: launch/deepspeed.sh PROCESSES COMMAND RUN.yaml [OPTIONS]
set -euo pipefail
processes=$1
shift
exec deepspeed --num_accelerators "$processes" --master_port "${MASTER_PORT:-29500}" \
  --module post_dist "$@"
