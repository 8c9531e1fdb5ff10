#!/usr/bin/env bash
# Submit a whole way as jobs that wait for each other: shards -> phase 1 -> phase 2 -> fine-tuning.
#
#   slurm/pipeline.sh TEXT TOKENIZER PHASE1_JSON PHASE2_JSON DEEPSPEED_JSON OUT [TASK [SEEDS [options of finetune.py]]]
#   slurm/pipeline.sh text/ tokenizer/ p1.json p2.json ds_configs/zero2.json runs/large sst2 5 --data /shared/glue
#
# Runs on a login node, from the folder that holds bert_ds/. Both recipes are checked before anything is submitted, so
# that a typo in phase 2 does not wait for phase 1. Both train on OUT/shards; phase 2 starts from the weights of
# phase 1. When a job fails, those that wait for it are cancelled; submitted again, the same command continues.
# Flags of sbatch for each kind of job stand in site.env: SHARDS_FLAGS, PHASE_FLAGS, FINETUNE_FLAGS.
set -euo pipefail

root=${BERT_DS_ROOT:-$PWD}
scripts=$root/slurm
[[ -f $scripts/pretrain.sh ]] || scripts=$root/bert_ds/_shipped/slurm
[[ -f $scripts/pretrain.sh ]] || { echo "$root holds no bert_ds/: start there, or set BERT_DS_ROOT" >&2; exit 2; }
(( $# >= 6 )) || { echo "wanted TEXT TOKENIZER PHASE1_JSON PHASE2_JSON DEEPSPEED_JSON OUT [TASK [SEEDS]]" >&2; exit 2; }
text=$(realpath "$1") tokenizer=$(realpath "$2") phase1=$(realpath "$3") phase2=$(realpath "$4")
deepspeed_config=$(realpath "$5") out=$(realpath -m "$6") task=${7:-} seeds=${8:-1}
[[ $out != *[%\\]* ]] || { echo "$out: Slurm would read % and \\ in the names of log files" >&2; exit 2; }
[[ $seeds =~ ^[1-9][0-9]{0,3}$ ]] || { echo "SEEDS: found $seeds, wanted a number" >&2; exit 2; }

PYTHON=$root/.venv/bin/python SHARDS_FLAGS=() PHASE_FLAGS=() FINETUNE_FLAGS=()
[[ -x $PYTHON ]] || PYTHON=python3
site=${BERT_DS_SITE:-$scripts/site.env}
# shellcheck disable=SC1090
[[ ! -f $site ]] || source "$site"

corpus=(--set "corpus.sources.0.path=$out/shards" --set "corpus.tokenizer=$tokenizer")
for recipe in "$phase1" "$phase2"; do
  "$PYTHON" "$root/bert_ds/check_run.py" --run "$recipe" --deepspeed_config "$deepspeed_config" "${corpus[@]}" >/dev/null
done
for folder in "$out/phase1" "$out/phase2" "$out/finetuned"; do
  [[ ! -d $folder ]] || "$PYTHON" "$root/bert_ds/judge_launch.py" --run_dir "$folder" --job 0 --world_size 1 \
    --srun_code 0 --may_enter
done
mkdir -p "$out"

# AFTER RUN_DIR FLAG... SCRIPT ARGUMENT...: submit a job that starts when the job AFTER has ended well; sets `job`.
submit() {
  local after=()
  [[ -z $1 ]] || after=(--dependency="afterok:$1" --kill-on-invalid-dep=yes)
  job=$(cd "$root" && sbatch --parsable --output="$out/%x-%j.out" "${after[@]}" "${@:3}")
  job=${job%%;*}
  mkdir -p "$2"
  printf '{"job": "%s"}\n' "$job" >"$2/submit.json" # so that runs.py shows it while it waits
}

submit "" "$out" "${SHARDS_FLAGS[@]}" "$scripts/build_shards.sh" "$text" "$tokenizer" "$out/shards"
echo "shards: job $job"
submit "$job" "$out/phase1" "${PHASE_FLAGS[@]}" --job-name=bert-phase1 "$scripts/pretrain.sh" "$phase1" \
  "$deepspeed_config" "$out/phase1" "${corpus[@]}"
echo "phase 1: job $job"
submit "$job" "$out/phase2" "${PHASE_FLAGS[@]}" --job-name=bert-phase2 "$scripts/pretrain.sh" "$phase2" \
  "$deepspeed_config" "$out/phase2" "${corpus[@]}" --set "init_from=$out/phase1"
echo "phase 2: job $job"
if [[ -n $task ]]; then
  submit "$job" "$out/finetuned" "${FINETUNE_FLAGS[@]}" --array="1-$seeds" "$scripts/finetune.sh" "$task" \
    "$out/phase2" "" "$out/finetuned" "${@:9}"
  echo "fine-tuning: job $job"
fi
echo "watch them: $PYTHON $root/bert_ds/runs.py $out --watch"
