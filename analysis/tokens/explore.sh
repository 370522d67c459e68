#!/usr/bin/env bash
# explore.sh FILE [PROCESSES=8] [SECONDS_A_RUN=400] [SECONDS_IN_ALL=560]
# Runs explore.py on each line of FILE (name=... key=value ...; # begins a comment), PROCESSES at a time, in order.
# Results: runs.jsonl and log.txt in EXPLORE_OUT. PYTHON (python3) and what explore.py reads from the environment hold.
set -uo pipefail
file=$1 procs=${2:-8} each=${3:-400} all=${4:-560}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export here each PYTHON=${PYTHON:-python3} EXPLORE_OUT=${EXPLORE_OUT:-.} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2}
end=$(( $(date +%s) + all ))
export end
mkdir -p "$EXPLORE_OUT"
lines=$(sed 's/#.*//; s/[[:space:]]*$//' "$file" | grep -v '^[[:space:]]*$')

# Whole data sets are decoded once, before the processes need them.
if ! grep -q '[ ,]n=[1-9]' <<<"$lines"; then
  sets=$(
    {
      grep -o 'data=[a-z0-9]*' <<<"$lines"
      grep -q -v 'data=' <<<"$lines" && echo data=cifar100
    } | sort -u | cut -d= -f2
  )
  # shellcheck disable=SC2086
  "$PYTHON" "$here/explore.py" --prep $sets || exit 1
fi

one() {
  local name left rc log=$EXPLORE_OUT/log.txt
  name=$(grep -o 'name=[^ ,]*' <<<"$1" | cut -d= -f2)
  left=$(( end - $(date +%s) ))
  if [ "$left" -lt 15 ]; then
    echo "[$name] NOT STARTED: no time left" | tee -a "$log"
    return 0
  fi
  # shellcheck disable=SC2086
  timeout -k 5 $(( left < each ? left : each )) "$PYTHON" "$here/explore.py" $1 2>&1 | sed -u "s/^/[$name] /" >>"$log"
  rc=${PIPESTATUS[0]}
  echo "[$name] rc $rc, $(( end - $(date +%s) )) s left" | tee -a "$log"
  [ "$rc" = 0 ] || grep -F "[$name]" "$log" | tail -n 4
  return 0
}
export -f one
# shellcheck disable=SC2016
xargs -P "$procs" -d '\n' -I{} bash -c 'one "$1"' _ {} <<<"$lines"
echo "$(wc -l <"$EXPLORE_OUT/runs.jsonl") runs in $EXPLORE_OUT/runs.jsonl"
