#!/usr/bin/env bash
# Builds sdist and wheel into dist/, installs the wheel beside nothing of the repository, and does the main job with it.
# PYTHON names the interpreter of that environment; CONSTRAINTS "" leaves the newest versions to pip.
set -euo pipefail
cd "$(dirname "$0")/.."
constraints=${CONSTRAINTS-constraints.txt}
rm -rf dist build/lib
.venv/bin/python -m build --outdir dist . > build/wheel.log 2>&1 || { tail -20 build/wheel.log; exit 1; }
size=$(stat -c %s dist/*.whl)
echo "wheel $size bytes"
test "$size" -le 12000000

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/env"
pip() { "$place/env/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --constraint constraints.txt torch  # the CPU build; an unpinned one pulls gigabytes of CUDA libraries
pip install ${constraints:+--constraint "$constraints"} mypy dist/*.whl
pip list 2>/dev/null | (! grep -i '^nvidia')  # a torch that is there is kept

cp examples/phonebook.jsonl "$place"
cat > "$place/user.py" <<'PY'
from loramem import MemoryStore, WriteReport

store: MemoryStore = MemoryStore("memory")
report: WriteReport = store.write({"door code": "4711"})
value: str = store.recall("door code")
print(value)
PY
cd "$place"
export PATH="$place/env/bin:$PATH"
loramem --version
mypy --strict user.py
test "$(python user.py)" = 4711
begun=$(date +%s.%N)
test "$(loramem recall 'door code')" = 4711
echo "first recall of a new process: $(echo "$(date +%s.%N) $begun" | awk '{printf "%.1f", $1 - $2}') s"
loramem write phonebook.jsonl --store demo
loramem verify --store demo
