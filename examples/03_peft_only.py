"""Recall with PEFT alone, nothing of loramem: python examples/03_peft_only.py BASE DEPLOYED ADAPTER KEY…

BASE is the base model's folder or Hub id, DEPLOYED what `loramem deploy --target peft` wrote, ADAPTER a folder in it.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base, deployed, adapter, *keys = sys.argv[1:]
prompt = json.loads((Path(deployed) / "prompt.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # the dtype that was certified
model.generation_config = GenerationConfig()  # published ones sample, or penalise repetition
model = PeftModel.from_pretrained(model, Path(deployed) / adapter).eval()

for key in keys:
    key_ids = tokenizer(key, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt["prefix_ids"], *key_ids, *prompt["suffix_ids"]]])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=prompt["end_id"],
        pad_token_id=prompt["end_id"],
    )
    print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
