#!/usr/bin/env bash
# One fold on two machines of four GPUs, requeued until it is finished:
#
#     sbatch examples/slurm.sh --fold 0
#
# from the project's folder, with any other flags of train.py; the cases and OUT must be seen by both machines. Five minutes before its time is
# up Slurm sends SIGTERM: train.py finishes the step, saves and leaves, and the job queues again. A rank or a machine that dies is
# started again from OUT/last.pt, at most three times. For one machine: --nodes=1. To predict over both, put infer.py and its flags in train.py's place
# and drop what follows the srun: started again, it goes on with the cases that are missing.
#
#SBATCH --job-name=segresnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

out=runs/slurm-$SLURM_JOB_ID    # the job keeps its number when it is requeued
mkdir -p "$out"
touch "$out/started"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Srun does not take --cpus-per-task over from the job. A machine that fails ends the others too, and two jobs on one machine need two ports.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=4 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id="$SLURM_JOB_ID" train.py --out "$out" "$@"

if python -c 'import sys, torch; sys.exit(not torch.load(sys.argv[1], map_location="cpu", mmap=True, weights_only=True)["finished"])' "$out/last.pt" 2> /dev/null; then
    echo "finished: $out"
elif [ "$out/last.pt" -nt "$out/started" ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "nothing was saved, so it is not tried again; the error is above" >&2
    exit 1
fi
