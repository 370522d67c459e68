#!/usr/bin/env bash
# Reads results files with other libraries than ours, which no test installs:
#   tests/manual/read_results.sh RESULTS.h5 ...      of a finished run, and of one that goes on or was killed
# h5wasm is what h5web reads local files with (needs node and npm); h5dump (Debian's hdf5-tools, HDF5 1.10) stands in
# for programs with an older library, as MATLAB has. Octave's `load` does not take the UTF-8 texts.
set -euo pipefail
files=()
for file in "$@"; do files+=("$(realpath "$file")"); done
for file in "${files[@]:?usage: read_results.sh RESULTS.h5 ...}"; do
  h5dump "$file" >/dev/null
  h5dump --version
  h5dump -d /steps/loss -s 0 -c 3 "$file" | grep '(0):' | head -1
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent h5wasm >/dev/null
cat >read.mjs <<'JS'
import h5wasm from "h5wasm/node";
await h5wasm.ready;
function count(group) {
  return group.keys().reduce((sum, name) => {
    const found = group.get(name);
    if (found instanceof h5wasm.Group) return sum + count(found);
    found.value;  // throws if it cannot be read
    return sum + 1;
  }, 0);
}
for (const path of process.argv.slice(2)) {
  const file = new h5wasm.File(path, "r");
  const loss = file.get("steps/loss");
  console.log(`h5wasm: ${count(file)} datasets, steps/loss ${loss.shape}: ${loss.value.slice(0, 3)}`);
  file.close();
}
JS
node read.mjs "${files[@]}"
