#!/usr/bin/env bash
# Pre-train on a cluster, and go on through time limits, preemption, dead ranks and dead nodes until the run is done.
#
#   sbatch [sbatch's own flags] slurm/pretrain.sh [RUN_JSON] [DEEPSPEED_JSON] [RUN_DIR] [options of pretrain.py]
#   sbatch --gpus-per-node=1 slurm/pretrain.sh my_run.json ds_configs/zero1.json runs/mine
#   sbatch --nodes=8 --gpus-per-node=8 --exclusive slurm/pretrain.sh my_run.json ds_configs/zero2.json runs/mine
#
# One rank per GPU; on a partition without GPUs one per --ntasks-per-node. "" takes a default: the embedded recipe,
# ds_configs/zero2.json, runs/<job name>-<job id>. What a site must set stands in slurm/site.env (see site.env.example).
# Submit from the folder that holds bert_ds/, or set BERT_DS_ROOT. Exit codes: 0 done, 2 configuration, 3 data,
# 4 checkpoint, 5 diverged, 75 stopped on request, 1 anything else.
#SBATCH --job-name=bert-pretrain
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

root=${BERT_DS_ROOT:-$SLURM_SUBMIT_DIR}
scripts=$root/slurm
[[ -f $scripts/common.sh ]] || scripts=$root/bert_ds/_shipped/slurm
[[ -f $scripts/common.sh ]] || { echo "$root holds no bert_ds/: submit from there, or set BERT_DS_ROOT" >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$scripts/common.sh"

recipe=${1:-}
deepspeed_config=${2:-}
run_dir=${3:-}
: "${deepspeed_config:=$(dirname "$scripts")/ds_configs/zero2.json}" "${run_dir:=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}"

files=(--deepspeed_config "$deepspeed_config")
[[ -z $recipe ]] || files+=(--run "$recipe")
options=("${@:4}")
overrides=()
for index in "${!options[@]}"; do
  [[ ${options[index]} != --set=* ]] || overrides+=("${options[index]}")
  [[ ${options[index]} != --set ]] || overrides+=(--set "${options[index + 1]:-}")
done

check_ranks
python_here "$root/bert_ds/check_run.py" "${files[@]}" "${overrides[@]}" --world_size "$world_size"
run_until_done "$run_dir" "$root/bert_ds/pretrain.py" "${files[@]}" --run_dir "$run_dir" --resume auto "${options[@]}"
