"""Several adapters in one batch of PEFT, each row through its own: python examples/04_mixed_batch.py BASE DEPLOYED

DEPLOYED is what `loramem deploy --target peft --include-keys` wrote: its routing.jsonl says which adapter answers which
key, and with which prompt ids.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base, deployed = sys.argv[1], Path(sys.argv[2])
end_id = json.loads((deployed / "prompt.json").read_text())["end_id"]
routes = [json.loads(line) for line in (deployed / "routing.jsonl").read_text().splitlines()]
first, *others = sorted({route["adapter"] for route in routes})

tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model.generation_config = GenerationConfig()
model = PeftModel.from_pretrained(model, deployed / first, adapter_name=first).eval()
for adapter in others:
    model.load_adapter(deployed / adapter, adapter_name=adapter)

width = max(len(route["prompt_ids"]) for route in routes)  # answers must begin in one column: pad on the left
padding = [width - len(route["prompt_ids"]) for route in routes]
output = model.generate(
    input_ids=torch.tensor([[end_id] * n + route["prompt_ids"] for n, route in zip(padding, routes, strict=True)]),
    attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding]),
    max_new_tokens=max(route["max_tokens"] for route in routes),
    do_sample=False,
    eos_token_id=end_id,
    pad_token_id=end_id,
    adapter_names=[route["adapter"] for route in routes],
)
values = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
for route, value in zip(routes, values, strict=True):
    print(f"{route['key']}\t{value}")
