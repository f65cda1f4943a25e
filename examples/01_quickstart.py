"""Write two facts into an adapter of the embedded base model and read one back: python examples/01_quickstart.py"""

import sys
import tempfile

from loramem import KeyNotFound, MemoryStore

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp() + "/memory"
store = MemoryStore(folder)  # the embedded base model, loramem-tiny
report = store.write(
    [
        {"key": "Ada Lindqvist:", "value": "9100672710"},
        ("deploy token", "ghx_7Qd2-94af"),
    ]
)
print(f"{report.written} records at rank {report.rank}, lowest p {report.min_prob:.2f}, {report.elapsed_s:.1f} s")

print(store.recall("Ada Lindqvist:"))  # decoded from the weights

for token in store.explain("deploy token").tokens:
    print(f"{token.text!r:>12}  p {token.prob:.3f}  without the adapter {token.base_prob:.3f}")

try:
    store.recall("Ada Lindquist:")
except KeyNotFound as error:
    print(error)
