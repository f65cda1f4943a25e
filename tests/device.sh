#!/usr/bin/env bash
# Measure loramem on a CUDA device, in one command from the repository root:
#
#   SMOLLM2=path/to/SmolLM2-135M-Instruct OUT=build/device tests/device.sh
#
# Features, training, proof and writes on SmolLM2 (skipped without SMOLLM2) and on random weights of Qwen3-8B's shape.
# OUT receives the measurements as JSON lines, their tables as device.md, and what went wrong in device.log. Each part
# is ended when its time is over; all of them take 8 minutes at most.
#
#   --install   pip install -e . first
#   --quick     tiny sizes on any device, to see that it works
#
# PYTHON names the interpreter: .venv/bin/python where there is one, otherwise python3.
set -euo pipefail
cd "$(dirname "$0")/.."

install=no device=cuda quick=() sizes=(--records 100,400 --seeds 1)
for option in "$@"; do
  case $option in
    --install) install=yes ;;
    --quick) quick=(--quick --threads 1) device=auto sizes=() ;;
    *) echo "tests/device.sh: unknown option $option; there are --install and --quick" >&2; exit 2 ;;
  esac
done
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
out=${OUT:-build/device}

[ $install = no ] || "$PYTHON" -m pip install --quiet --editable .
if [ $device = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "tests/device.sh: torch finds no CUDA device here; --quick runs tiny sizes on the CPU" >&2
  exit 1
fi

mkdir -p "$out"
: > "$out/device.md"
: > "$out/device.log"
failed=0

measure() { # title, seconds, suite, options of the suite…
  echo "$1: $2 s at most" >&2
  printf '## %s\n\n' "$1" >> "$out/device.md"
  local command=("$PYTHON" -m loramem_cli suite run "$3" --device "$device" --out "$out/$3.jsonl" "${@:4}" "${quick[@]}")
  if ! timeout --signal=INT --kill-after=10 "$2" "${command[@]}" >> "$out/device.md" 2> >(tee -a "$out/device.log" >&2); then
    failed=1
    # What was finished until then.
    "${command[@]}" --no-run >> "$out/device.md" 2>> "$out/device.log" || echo "nothing was finished" >> "$out/device.md"
  fi
  echo >> "$out/device.md"
}

if [ -n "${SMOLLM2:-}" ]; then
  measure "SmolLM2, by phase" 110 large-base --model "$SMOLLM2"
  measure "SmolLM2, whole writes through a store" 90 write-scaling --model "$SMOLLM2" "${sizes[@]}"
else
  echo "tests/device.sh: SMOLLM2 names no folder, so SmolLM2 is skipped" >&2
fi
measure "Random weights of Qwen3-8B's shape, by phase" 270 large-base

cat "$out/device.md"
exit $failed
