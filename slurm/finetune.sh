#!/usr/bin/env bash
# Fine-tune on a cluster, with the same restarts as pretrain.sh.
#
#   sbatch [sbatch's own flags] slurm/finetune.sh TASK MODEL [DEEPSPEED_JSON] [RUN_DIR] [options of finetune.py]
#   sbatch --gpus-per-node=1 --array=1-5 slurm/finetune.sh sst2 runs/mine "" runs/sst2 --data /shared/glue
#
# MODEL: a Hugging Face folder, or a pre-training run, which is exported first. Each task of an array is a run of its own
# with its number as the seed, in RUN_DIR/seed_N; beside --search SPACE it is the trial of this number, in RUN_DIR/trial_N,
# and finetune.py without --trial compares them. "" takes a default: ds_configs/zero1.json, runs/<job name>-<job id>.
#SBATCH --job-name=bert-finetune
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

task=${1:-} model=${2:-} deepspeed_config=${3:-} run_dir=${4:-}
[[ -n $task && -n $model ]] || refuse "wanted TASK MODEL [DEEPSPEED_JSON] [RUN_DIR] [options of finetune.py]"
options=("${@:5}")
: "${deepspeed_config:=$(dirname "$scripts")/ds_configs/zero1.json}"
: "${run_dir:=runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  if [[ " ${options[*]} " == *" --search "* ]]; then
    printf -v below '/trial_%03d' "$SLURM_ARRAY_TASK_ID"
    options+=(--trial "$SLURM_ARRAY_TASK_ID")
  else
    run_dir=$run_dir/seed_$SLURM_ARRAY_TASK_ID
    options+=(--seed "$SLURM_ARRAY_TASK_ID")
  fi
fi

check_ranks
if [[ -f $model/run_config.json ]]; then
  {
    flock 9 # the tasks of an array start together
    [[ -f $model/hf/model.safetensors ]] || python_here "$root/bert_ds/export_hf.py" --run_dir "$model"
  } 9>"$model/export.lock"
  model=$model/hf
fi
run_until_done "$run_dir${below:-}" "$root/bert_ds/finetune.py" --task "$task" --model "$model" \
  --deepspeed_config "$deepspeed_config" --run_dir "$run_dir" --resume auto "${options[@]}"
