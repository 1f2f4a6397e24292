#!/usr/bin/env bash
# One machine: launch/deepspeed.sh PROCESSES COMMAND RUN.yaml [OPTIONS], with the deepspeed launcher.
set -euo pipefail
processes=$1
shift
exec deepspeed --num_accelerators "$processes" --master_port "${MASTER_PORT:-29500}" --module post_dist "$@"
