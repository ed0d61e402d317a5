#!/usr/bin/env bash
# Two nodes of 8 GPUs. On SIGTERM (preemption) or USR1 (two minutes before the time limit), the run saves and exits
# with code 130, and the job requeues itself; it then resumes from the newest undamaged checkpoint.
#SBATCH --job-name=oneblock
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
set -uo pipefail

RUN="${RUN:-$PWD/runs/$SLURM_JOB_NAME}"
DATA="${DATA:?set DATA to a folder of oneblock data prepare}"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

if [ -e "$RUN/latest" ]; then
    args=(--resume "$RUN")
else
    args=(--data "$DATA" --model llama-3.2-1b --context 4096 --mesh "dp=2 fsdp=8" --batch-size 128 --steps 100000
          --save-every 1000 --device cuda --out "$RUN")
fi

srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
    -m oneblock train "${args[@]}" &
job=$!

requeue() {
    echo "stopping; the job resumes later"
    scancel --signal=TERM "$SLURM_JOB_ID.0" # every rank finishes its training step, saves and exits
    wait "$job"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1 TERM
wait "$job"
