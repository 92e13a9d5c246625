#!/bin/bash
# Pretraining on several machines under Slurm:   sbatch examples/slurm.sh DATA RUN [MORE OPTIONS OF PRETRAIN]
# DATA and RUN lie on a file system that all machines share. Submit the same line again to go on.
#SBATCH --job-name=noisyssl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
set -euo pipefail

data=$1 run=$2
shift 2
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
resume=()
if [ -e "$run" ]; then resume=(--resume); fi

# one torchrun on each machine starts one process per GPU; Slurm's TERM comes three minutes before the end
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m noisyssl.cli pretrain "$data" --out "$run" "${resume[@]}" "$@"
