#!/usr/bin/env bash
# run.sh FILE DATA OUT [PROCESSES=12] [SECONDS=560]: d2ft-hpc train for each line of FILE, PROCESSES at a time, in order.
# DATA: a folder with cifar10.h5, cifar100.h5, caltech101.h5 and the model's weights; OUT: where runs and their logs go.
# A run that exists already is left alone, so that the same command goes on; none starts in the last 30 seconds.
set -uo pipefail
file=$1
export data=$2 out=$3 PYTHON=${PYTHON:-python3} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2}
end=$(( $(date +%s) + ${5:-560} ))
export end
mkdir -p "$out"

one() {
  local config set rest name left
  read -r config set rest <<<"$1"
  name=$(tr ' =' '_-' <<<"$config $set $rest" | sed -E 's/_(run|train|data|plan)\./_/g')
  left=$(( end - $(date +%s) ))
  [ -e "$out/$name/results.h5" ] && return 0
  [ "$left" -lt 30 ] && { echo "$name: not started, no time left"; return 0; }
  # shellcheck disable=SC2086
  timeout -k 20 "$left" "$PYTHON" -m d2ft_hpc train "configs/paper/$config.yaml" $rest \
    data.root="$data/$set.h5" model.name=vit_small_patch14_dinov2 \
    model.weights="$data/vit_small_patch14_dinov2.safetensors" train.checkpoint_every=null \
    run.folder="$out" run.name="$name" >"$out/$name.log" 2>&1
  echo "$name: status $?, $(( end - $(date +%s) )) s left; $(tail -n 1 "$out/$name.log" | cut -c1-150)"
}
export -f one
grep -v '^#' "$file" | xargs -P "${4:-12}" -d '\n' -I{} bash -c 'one "$1"' _ {}
