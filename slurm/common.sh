# shellcheck shell=bash
# What the job scripts share; they source it after setting `root` (holds bert_ds/) and `scripts` (holds this file).
#
#   check_ranks                       from the allocation: ranks_per_node, world_size, cores
#   python_here SCRIPT ARGUMENT...    one Python process on the first node, in the container if there is one
#   run_until_done RUN_DIR SCRIPT ARGUMENT...   one task per rank by srun, again and again, until the run is done or
#                                     there is a reason to stop; ends the job

set -euo pipefail
: "${root:?is set by the script that sources this file}" "${scripts:?is set by the script that sources this file}"

say() { printf '%(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }
refuse() { say "$*" >&2; exit 2; }

stop="" srun_pid=""
trap 'stop=TERM' TERM # Slurm sends it to the ranks as well, and decides itself whether the job starts again
trap 'stop=USR1; forward_stop' USR1

SRUN_FLAGS=() CONTAINER=() patience=() PYTHON=$root/.venv/bin/python RESTARTS_WITHOUT_PROGRESS=3
[[ -x $PYTHON ]] || PYTHON=python3
site=${BERT_DS_SITE:-$scripts/site.env}
if [[ -n ${BERT_DS_SITE:-} || -f $site ]]; then
  set +u # modules and activation scripts of sites use unset variables
  # shellcheck disable=SC1090
  source "$site"
  set -u
fi

# shellcheck source=slurm/requeue.sh
source "$scripts/requeue.sh"

check_ranks() {
  gpus=${SLURM_GPUS_ON_NODE:-0}
  local asked=${SLURM_NTASKS_PER_NODE:-}
  [[ -n $asked ]] || asked=$(( ${SLURM_NTASKS:-0} / SLURM_JOB_NUM_NODES ))
  if (( gpus > 0 && asked > 1 && asked != gpus )); then
    refuse "$asked tasks per node, but every one of the $gpus GPUs of a node gets one: leave the tasks out"
  fi
  ranks_per_node=$(( gpus > 0 ? gpus : asked > 0 ? asked : 1 ))
  world_size=$(( SLURM_JOB_NUM_NODES * ranks_per_node ))
  cores=${SLURM_CPUS_PER_TASK:-$(( SLURM_CPUS_ON_NODE / ranks_per_node ))}
  (( cores > 0 )) || refuse "$SLURM_CPUS_ON_NODE cores for $ranks_per_node ranks of a node: add --exclusive, or" \
    "--ntasks-per-node=$ranks_per_node --cpus-per-task=N"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
}

python_here() {
  local here=()
  if (( ${#SRUN_FLAGS[@]} + ${#CONTAINER[@]} )); then
    here=(srun --nodes=1 --ntasks=1 --overlap --input=none "${SRUN_FLAGS[@]}" "${CONTAINER[@]}")
  fi
  "${patience[@]}" "${here[@]}" "$PYTHON" "$@"
}

run_until_done() {
  run_dir=$1 launch=0
  shift
  enter_run_folder
  while :; do
    srun_code=138
    [[ -n $stop ]] || launch_once "$@" # a signal between two launches is judged like one that ended a launch
    end_steps
    local answer action code delay patience=(timeout 120) # in a container it is a step, which slurmctld must start
    answer=$(python_here "$root/bert_ds/judge_launch.py" --run_dir "$run_dir" --job "$SLURM_JOB_ID" \
      --world_size "$world_size" --srun_code "$srun_code" --stop "$stop" --nodes_answer "$(nodes_answer)" \
      --limit "$RESTARTS_WITHOUT_PROGRESS") || true
    patience=()
    [[ -n $answer || $stop != USR1 ]] || answer="requeue 75 0"
    read -r action code delay <<<"$answer"
    case $action in
      again) sleep "$delay" & wait $! || true ;;
      requeue) requeue ;;
      done | stop) exit "$code" ;;
      *) say "judge_launch.py answered \"$answer\"" >&2; exit 1 ;;
    esac
  done
}

enter_run_folder() {
  [[ $run_dir == /* ]] || run_dir=$PWD/$run_dir
  [[ $run_dir != *[%\\]* ]] || refuse "$run_dir: Slurm would read % and \\ in the names of log files"
  [[ ! -d $run_dir || -z $(ls -A "$run_dir") ]] || may_enter "$run_dir"
  exits=$run_dir/logs/exits
  mkdir -p "$exits" || refuse "$run_dir cannot be made"
  local owner=""
  [[ ! -f $run_dir/slurm_job ]] || owner=$(<"$run_dir/slurm_job")
  if [[ $owner =~ ^[0-9]+$ && $owner != "$SLURM_JOB_ID" ]]; then
    [[ -z $(squeue --noheader --jobs="$owner" --states=R,CG,S 2>/dev/null) ]] ||
      refuse "$run_dir belongs to job $owner, which is running"
  fi
  echo "$SLURM_JOB_ID" >"$run_dir/slurm_job"
  forget_exits
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}} PYTHONUNBUFFERED=1
  say "start $(( ${SLURM_RESTART_COUNT:-0} + 1 )) on ${hosts[*]}: $world_size ranks, $cores cores each, in $run_dir"
}

# Before a byte changes: in a folder that is neither empty nor a run's nothing starts.
may_enter() {
  python_here "$root/bert_ds/judge_launch.py" --run_dir "$1" --job "$SLURM_JOB_ID" --world_size "$world_size" \
    --srun_code 0 --may_enter || exit 2
}

forget_exits() {
  rm -f "$exits"/rank_*.json "$exits/srun.err"
  : >"$exits/started" # what is newer than this file belongs to the coming launch
}

launch_once() {
  launch=$(( launch + 1 ))
  # Below the ephemeral ports; another one for each launch, as a rank of the last may still hold the old one.
  export MASTER_PORT=$(( 12000 + (SLURM_JOB_ID * 16 + launch % 16) % 20000 ))
  forget_exits
  local command=(srun --kill-on-bad-exit=1 --wait=600 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$world_size"
    --ntasks-per-node="$ranks_per_node" --cpus-per-task="$cores" --input=none --open-mode=append
    --output="$run_dir/logs/rank_%t.out")
  (( gpus == 0 )) || command+=(--gpu-bind=none) # a rank picks its GPU by its number, and NCCL wants to see them all
  command+=("${SRUN_FLAGS[@]}" "${CONTAINER[@]}" "$PYTHON" "$@")
  say "launch $launch, port $MASTER_PORT; every rank writes $run_dir/logs/rank_N.out"
  BERT_DS_EXITS=$exits "${command[@]}" 2> >(tee "$exits/srun.err" >&2) &
  srun_pid=$!
  tail --pid="$srun_pid" --lines=0 --retry --follow=name "$run_dir/logs/rank_0.out" 2>/dev/null &
  local tail_pid=$!
  [[ -z $stop ]] || forward_stop
  while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" || true; done # a trap ends `wait` early
  wait "$srun_pid" && srun_code=0 || srun_code=$?
  srun_pid=""
  # It looks every second whether srun is gone; the last lines of rank 0 come before what is said of the launch.
  while kill -0 "$tail_pid" 2>/dev/null; do wait "$tail_pid" || true; done
}

forward_stop() { [[ -z $srun_pid ]] || kill -USR1 "$srun_pid" 2>/dev/null || true; }

# A step whose srun was killed goes on without it. The last task of an array has the number of the whole array, and
# squeue then shows the steps of its brothers too.
end_steps() {
  local step job=$SLURM_JOB_ID
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  for step in $(timeout 60 squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i); do
    [[ $step =~ ^${job}\.[0-9]+$ ]] || continue
    say "ending step $step, which outlived its srun"
    scancel --signal=KILL "$step" || true
  done
}
nodes_answer() {
  [[ $stop != USR1 ]] || { echo yes; return; } # it is queued again anyway, and slurmctld may be down
  timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap \
    --input=none --output=none true 2>/dev/null && echo yes || echo no
}
