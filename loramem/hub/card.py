"""The model card of a published store. It names no key, no value and no path."""

from huggingface_hub import ModelCardData

from loramem import embedded
from loramem.hub.publication import Publication, PublishedAdapter
from loramem.results import ChatKeys

TAGS = ["lora", "loramem", "memory"]


def model_card(
    publication: Publication, repo: str, license: str, loramem_version: str, chat: ChatKeys | None = None
) -> str:
    """README.md of the repository: metadata for the Hub, then what is inside, how to use it and what is proved.

    Args:
        chat: Which keys may be asked by chat; only their numbers are told.
    """
    base = publication.base_model
    data = ModelCardData(
        base_model=base.id if base.revision is not None else None,  # other ids are none of the Hub's
        library_name="peft",
        license=license,
        tags=TAGS,
    )
    return f"---\n{data.to_yaml()}\n---\n" + _BODY.format(
        name=repo.rpartition("/")[2],
        base=_base(publication),
        records=publication.records,
        adapters=len(publication.adapters),
        parameters=sum(adapter.parameters for adapter in publication.adapters),
        inside=_inside(publication),
        absent=_absent(publication),
        load=_load(publication),
        repo=repo,
        dtype=base.dtype,
        first=publication.adapters[0].id if publication.adapters else "ID",
        certificates="\n".join(map(_row, publication.adapters)),
        threshold=publication.certify_threshold,
        version=loramem_version,
        by_chat="" if chat is None else _by_chat(chat),
    )


def _by_chat(chat: ChatKeys) -> str:
    counts = [f"{chat.safe:,} keys may be sent as the user's message of a chat", f"{len(chat.needs_ids):,} need ids"]
    counts += [f"of {chat.unknown:,} it is not known"] if chat.unknown else []
    return (
        f"\nAsked through a chat server: {'; '.join(counts)} (`prompt` in `records.jsonl`, `chat`). A record whose "
        "`prompt` has `ids` is asked by these in place of the joined ones above, one with `own` by what the chat "
        "template gives for its key.\n"
    )


def _base(publication: Publication) -> str:
    base = publication.base_model
    if base.id == embedded.NAME:
        return f"`{base.id}`, the base model inside the loramem package"
    if base.revision is None:
        return f"`{base.id}`, a local model that is not on the Hub under this name"
    return f"[`{base.id}`](https://huggingface.co/{base.id}) at commit `{base.revision}`"


def _row(adapter: PublishedAdapter) -> str:
    proof = f"{adapter.proof.dtypes['adapter']} on {adapter.proof.dtypes['base']}, {adapter.proof.device}"
    size = f"{adapter.rank} | {adapter.records:,} | {adapter.parameters:,}"
    return f"| `{adapter.id}` | {size} | {adapter.min_prob:.3f} | {proof} |"


def _inside(publication: Publication) -> str:
    said = ["adapters in PEFT format", "a digest of every value, salted"]
    said += ["the keys"] if publication.key_salt is None else ["a digest of every key, salted"]
    return ", ".join([*said, "the values and metadata"] if publication.values else said)


def _absent(publication: Publication) -> str:
    absent = [] if publication.values else ["the values as text"]
    absent += [] if publication.key_salt is None else ["the keys: recall works for whoever knows one"]
    return "; ".join([*absent, "the base model", "records that were deleted or replaced"])


def _load(publication: Publication) -> str:
    base = publication.base_model
    if base.id == embedded.NAME:
        return "folder = loramem.base_path()  # pip install loramem"
    return f'folder = "{base.id}"' + (f'  # revision="{base.revision}"' if base.revision else "  # where you have it")


_BODY = """
# {name}

{records:,} records in {adapters:,} LoRA adapters ({parameters:,} parameters) of {base}, written verbatim by
[loramem](https://pypi.org/project/loramem/) {version}: given a record's key, greedy decoding gives its value exactly.

**Inside**: {inside}. **Not inside**: {absent}.

Whoever has this repository and the base model can extract the values, by asking for keys. Do not make it public unless
they may be.

## Recall with loramem

```console
$ loramem pull {repo} --store memory
$ loramem recall KEY --store memory
```

## Recall with PEFT alone

Which adapter holds a key is in `records.jsonl`. With the adapter's folder at hand:

```python
import json
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

{load}
adapter, key = "adapters/{first}", "your key"
prompt = json.loads(Path("loramem.json").read_text())["prompt"]  # the ids around the key
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype})
model.generation_config = GenerationConfig()  # published ones sample, or penalise repetition
model = PeftModel.from_pretrained(model, adapter)
key_ids = tokenizer(key, add_special_tokens=False)["input_ids"]
ids = torch.tensor([[*prompt["prefix_ids"], *key_ids, *prompt["suffix_ids"]]])
answer = model.generate(input_ids=ids, do_sample=False, max_new_tokens=256, eos_token_id=prompt["end_id"])
print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
```
{by_chat}
## What is proved

Every value was decoded greedily from the adapter as saved, end token included, in two batch compositions; every token
had p >= {threshold} under teacher forcing there. A certificate holds for its dtypes and device.

| adapter | rank | records | parameters | lowest p | proved with |
| --- | --- | --- | --- | --- | --- |
{certificates}
"""
