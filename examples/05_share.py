"""Publish a store on the Hub, and pull it into another folder: python examples/05_share.py ME/FACTS FOLDER

Needs HF_TOKEN or `hf auth login`. The repository is made private; keys do not go along as text.
"""

import sys
from pathlib import Path

from loramem import MemoryStore

repo, folder = sys.argv[1], Path(sys.argv[2])
with MemoryStore(folder / "here") as store:
    store.write({"Ada Lindqvist:": "9100672710", "deploy token": "ghx_7Qd2-94af"})
    pushed = store.push(repo)
    print(f"{pushed.records} records, {len(pushed.uploaded)} adapter uploaded")

with MemoryStore.pull(repo, folder / "there", revision=pushed.commit) as pulled:
    print(f"Asked for its key: {pulled.recall('Ada Lindqvist:')}")
    print(f"A key in the store as text: {'Ada Lindqvist:' in list(pulled.keys())}")
