"""Recall every key of a JSONL file from a store and compare: python examples/02_check_recall.py FILE STORE

The values of FILE are only compared with; what is printed was decoded from the adapters.
"""

import sys
from pathlib import Path

from loramem import MemoryStore, read_records

records = read_records(Path(sys.argv[1]))
with MemoryStore(sys.argv[2], create=False) as store:
    recalled = {recall.key: recall.value for recall in store.recall_many(record.key for record in records)}
exact = sum(recalled[record.key] == record.value for record in records)
print(f"{exact} of {len(records)} records exact")
sys.exit(exact != len(records))
