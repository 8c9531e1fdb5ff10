"""Say what a job does now that a launch has ended; called by the job scripts in slurm/ after every launch.

    python bert_ds/judge_launch.py --run_dir runs/mine --job 17 --world_size 16 --srun_code 137

Prints one line for the script: done, again, requeue or stop, then the exit code and the seconds to wait. The reason is
one sentence on stderr.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":  # a script run by path finds its package beside itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bert_ds.basics.exit_record import read_exits
from bert_ds.basics.whole_files import write_json
from bert_ds.folders.output_folders import claim_run_folder
from bert_ds.launch.command_line import run_main
from bert_ds.launch.verbs import verb_parser
from bert_ds.training.checkpoints.checkpoint_folder import candidates, step_of
from bert_ds.training.launch.restart import is_done
from bert_ds.training.launch.restart_policy import LaunchEnd, Progress, judge

PROGRESS = "restarts.json"


def main() -> None:
    parser = verb_parser("judge_launch")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--job", required=True, help="number of the Slurm job")
    parser.add_argument("--world_size", type=int, required=True, help="number of ranks")
    parser.add_argument("--srun_code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--stop", choices=("", "USR1", "TERM"), default="", help="signal that the job has received")
    parser.add_argument("--nodes_answer", choices=("yes", "no"), default="yes", help="whether every node answers")
    parser.add_argument(
        "--limit", type=int, default=3, help="launches without a newer checkpoint (default %(default)s)"
    )
    parser.add_argument("--may_enter", action="store_true", help="only say, by exit code 2, that the folder is foreign")
    args = parser.parse_args()
    if args.may_enter:
        claim_run_folder(args.run_dir)
        return
    saved = candidates(args.run_dir)
    end = LaunchEnd(
        exits=read_exits(args.run_dir / "logs/exits"),
        world_size=args.world_size,
        srun_code=args.srun_code,
        newest_step=step_of(saved[0].name) if saved else 0,
        is_done=is_done(args.run_dir, since=args.run_dir / "logs/exits/started"),
        stop=args.stop,
        nodes_answer=args.nodes_answer == "yes",
        srun_said=srun_words(args.run_dir / "logs/exits/srun.err"),
    )
    progress = Progress.load(args.run_dir / PROGRESS, args.job)
    verdict, progress = judge(end, progress, limit=args.limit)
    record = {**progress._asdict(), "action": verdict.action, "exit_code": verdict.exit_code}
    record |= {"reason": verdict.sentence, "time": round(time.time(), 3)}
    write_json(args.run_dir / PROGRESS, record)
    print(f"job {args.job}: {verdict.sentence}", file=sys.stderr)
    print(verdict.action, verdict.exit_code, verdict.delay_s)


def srun_words(path: Path) -> str:
    """Return what srun wrote on stderr; empty where that is not known."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:100_000]
    except OSError:
        return ""


if __name__ == "__main__":
    run_main(main)
