#!/usr/bin/env bash
# Build token shards on one machine of a cluster; a build that runs out of time is queued again and continues.
#
#   sbatch [sbatch's own flags] slurm/build_shards.sh INPUT TOKENIZER OUTPUT [options of build_shards.py]
#   sbatch --cpus-per-task=32 slurm/build_shards.sh /shared/text /shared/tokenizer /shared/shards
#SBATCH --job-name=bert-shards
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

root=${BERT_DS_ROOT:-$SLURM_SUBMIT_DIR}
scripts=$root/slurm
[[ -f $scripts/common.sh ]] || scripts=$root/bert_ds/_shipped/slurm
[[ -f $scripts/common.sh ]] || { echo "$root holds no bert_ds/: submit from there, or set BERT_DS_ROOT" >&2; exit 2; }
# shellcheck source=slurm/common.sh
source "$scripts/common.sh"

(( $# >= 3 )) || refuse "wanted INPUT TOKENIZER OUTPUT [options of build_shards.py]"
arguments=(--input "$1" --tokenizer "$2" --output "$3" --workers "$SLURM_CPUS_ON_NODE" "${@:4}")

python_here "$root/bert_ds/build_shards.py" "${arguments[@]}" &
build=$!
trap 'kill "$build"; wait "$build" || true; requeue' USR1
wait "$build"
say "built $3"
