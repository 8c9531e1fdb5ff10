#!/usr/bin/env bash
# Make .venv and install this checkout into it.
#   .ci/make_env.sh [dev]      with "dev": also what make test and make check need
# PYTHON names the interpreter (default python3). An importable torch 2.11-2.13 of that interpreter is kept and used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-}
python=${PYTHON:-python3}
venv=.venv

"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python {sys.version.split()[0]} found at {sys.executable}; 3.11 or newer is needed (set PYTHON=...)")
PY

stamp=$(cat setup.py pyproject.toml constraints-*.txt .ci/make_env.sh | sha256sum | cut -c1-16)
if [[ -f $venv/installed-$stamp-dev || ( -z $extra && -f $venv/installed-$stamp- ) ]]; then
  exit 0
fi

if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
  echo "note: no C++ compiler (c++ or g++) found. DeepSpeed builds its own CPU optimizer with one: without it, CPU"
  echo "      offload with deepspeed_cpu_adam does not work, everything else does. Debian, Ubuntu: apt-get install g++"
fi

torch_in_range='
import re, torch
major, minor = (int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
assert (2, 11) <= (major, minor) <= (2, 13), torch.__version__
print(torch.__version__, "cuda" if torch.version.cuda else "cpu")
'
system_packages=()
constraints=constraints-cpu.txt
kept=""
if found=$("$python" -c "$torch_in_range" 2>/dev/null); then
  read -r kept kind <<<"$found"
  system_packages=(--system-site-packages)
  constraints=constraints-$kind.txt
  echo "keeping torch $kept ($kind) of $("$python" -c 'import sys; print(sys.executable)')"
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  constraints=constraints-cuda.txt
fi

[[ -x $venv/bin/python ]] || "$python" -m venv "${system_packages[@]}" "$venv"
if [[ -n $kept ]]; then
  # The kept torch decides its own version and triton's; the rest of the tested set stays pinned.
  grep -v -E '^(torch|triton)==' "$constraints" >"$venv/constraints.txt"
  echo "torch==${kept%%+*}" >>"$venv/constraints.txt"
else
  cp "$constraints" "$venv/constraints.txt"
fi

echo "installing into $venv by $constraints (a few minutes)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$venv/constraints.txt")
# torch goes first and alone: DeepSpeed's source build looks at it, and no other build of it may be drawn in later.
[[ -n $kept ]] || "${pip[@]}" torch triton
DS_BUILD_OPS=0 "${pip[@]}" --editable ".${extra:+[$extra]}"
rm -f "$venv"/installed-*
touch "$venv/installed-$stamp-$extra"
