# shellcheck shell=bash
# Sends a job back to the queue; sourced by common.sh. Where slurmctld is down just then it is asked again until the
# job's time is up.

set -euo pipefail

job_end=$(date --date="$(timeout 60 squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null)" +%s 2>/dev/null) ||
  job_end=0 # no time limit
(( job_end > EPOCHSECONDS )) || job_end=0

requeue() {
  local answer refusals=0 said=0
  while ! answer=$(timeout 60 scontrol requeue "$SLURM_JOB_ID" 2>&1); do
    if [[ $(timeout 60 squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) == PENDING ]]; then
      say "Slurm has already queued it again"
      exit 75
    fi
    if [[ $(timeout 60 scontrol ping 2>/dev/null) == *" is UP"* ]] && (( ++refusals == 2 )); then # it may just have come
      say "cannot be queued again ($answer): submit the same command once more and it continues" >&2
      exit 75
    fi
    if (( job_end > 0 && EPOCHSECONDS + 5 >= job_end )); then
      say "cannot be queued again: slurmctld does not answer and the time is up ($answer): submit the same command" \
        "once more and it continues" >&2
      exit 75
    fi
    if (( EPOCHSECONDS - said >= 60 )); then
      said=$EPOCHSECONDS
      say "slurmctld does not queue it again ($answer): trying until it does or the time is up" >&2
    fi
    sleep "${REQUEUE_EVERY:-5}" & wait $! || true
  done
  say "queued again; Slurm lets it wait, two minutes unless the site says otherwise"
  exit 75
}
