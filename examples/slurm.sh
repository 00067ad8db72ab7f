#!/usr/bin/env bash
# One fold on two machines of four GPUs, requeued until it is finished:
#
#     sbatch examples/slurm.sh --fold 0
#
# From the project's folder, with any other flags of train.py. Both machines must see the cases and OUT.
# A job must hold at least one epoch, five minutes on the paper's four V100s: train.py saves once an epoch.
# A minute before its time is up the run is ended, and the job queues again to go on from OUT/last.pt.
# A rank or a machine that dies is started again from there too, at most three times.
# For one machine: --nodes=1.
#
#SBATCH --job-name=segresnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

out=runs/slurm-$SLURM_JOB_ID    # the job keeps its number when it is requeued
mkdir -p "$out"
touch "$out/started"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
seconds=$((SLURM_JOB_END_TIME - $(date +%s) - 60))    # at the end itself Slurm would kill this script as well

# Without the variable, ranks that are started again meet in what the last start left in torchrun's store.
# srun does not take --cpus-per-task over from the job. Two jobs on one machine need two ports.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
timeout "$seconds" srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=4 --max-restarts=3 --rdzv-backend=c10d \
    --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id="$SLURM_JOB_ID" \
    train.py --out "$out" "$@"

finished='torch.load(sys.argv[1], "cpu", mmap=True, weights_only=True)["finished"]'
if python -c "import sys, torch; sys.exit(not $finished)" "$out/last.pt" 2> /dev/null; then
    echo "finished: $out"
elif [ "$out/last.pt" -nt "$out/started" ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "nothing was saved, so it is not tried again; the error is above" >&2
    exit 1
fi
