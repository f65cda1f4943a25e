"""The README of a deployed folder: how the server is started, how it is asked, what was not tried."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loramem.models.adapter_header import AdapterHeader
from loramem.results import ChatKeys, Finding
from loramem.serving.rules import SGLANG_BATCH, max_rank_option
from loramem.serving.targets import NAMES, PEFT, SGLANG, VLLM, Target

_EXAMPLE_TOKENS = 64


def guide(
    adapters: Sequence[AdapterHeader],
    target: Target,
    base_name: str,
    prompt: Mapping[str, Any],
    notes: Sequence[Finding],
    chat: ChatKeys | None,
    routed: bool,
) -> str:
    """Markdown for whoever starts the server.

    Args:
        base_name: The model name or path that it is started with.
        prompt: Fields of `loramem.records.prompts.PromptTemplate`.
        notes: What the rules say beyond that it loads.
        chat: Which keys may be asked by chat; None without a chat template.
        routed: Whether the folder says which adapter answers which key.
    """
    paragraphs = [
        f"# {len(adapters)} LoRA adapters of `{base_name}` for {NAMES[target]}",
        "Written by `loramem deploy`. Each folder is one adapter in PEFT format; its name is its id in the store. They "
        "hold facts verbatim: whoever has them can extract them.",
        *COMMANDS[target](adapters, base_name, prompt),
        _routing(prompt, routed),
        *([_by_chat(chat, routed)] if chat else []),
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _vllm(adapters: Sequence[AdapterHeader], base_name: str, prompt: Mapping[str, Any]) -> list[str]:
    rank = max_rank_option(max(adapter.rank for adapter in adapters))
    command = [
        *("VLLM_ALLOW_RUNTIME_LORA_UPDATING=true", "VLLM_PLUGINS=lora_filesystem_resolver"),
        'VLLM_LORA_RESOLVER_CACHE_DIR="$PWD"',
        f"vllm serve {shlex.quote(base_name)}",
        f"--enable-lora --max-lora-rank {rank} --max-loras {min(len(adapters), SGLANG_BATCH)}",
        *_revision(adapters),
    ]
    request = (
        f'{{"model": "{adapters[0].name}", "prompt": [PROMPT IDS], "temperature": 0, '
        f'"repetition_penalty": 1, "max_tokens": {_EXAMPLE_TOKENS}, "stop_token_ids": [{prompt["end_id"]}]}}'
    )
    return [
        "In this folder (written from vLLM's documentation and sources; not run by loramem):",
        _block(" \\\n  ".join(command)),
        "The name after `vllm serve` must be the one in the adapters' `base_model_name_or_path`, letter by letter; "
        "`--served-model-name` may be another. An adapter is loaded when it is first asked for:",
        _block(f"curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{request}'"),
    ]


def _sglang(adapters: Sequence[AdapterHeader], base_name: str, prompt: Mapping[str, Any]) -> list[str]:
    modules = " ".join(sorted(frozenset().union(*(adapter.modules for adapter in adapters))))
    command = [
        f"python -m sglang.launch_server --model-path {shlex.quote(base_name)}",
        "--enable-lora",
        f"--max-lora-rank {max(adapter.rank for adapter in adapters)}",
        f"--lora-target-modules {modules}",
        f"--max-loras-per-batch {min(len(adapters) + 1, SGLANG_BATCH)}",
        *_revision(adapters),
        "--lora-paths " + " ".join(f"{adapter.name}=./{adapter.name}" for adapter in adapters),
    ]
    request = (
        f'{{"input_ids": [PROMPT IDS], "lora_path": "{adapters[0].name}", "sampling_params": {{"temperature": 0, '
        f'"repetition_penalty": 1, "max_new_tokens": {_EXAMPLE_TOKENS}, "stop_token_ids": [{prompt["end_id"]}]}}}}'
    )
    return [
        "In this folder (written from SGLang's documentation and sources; not run by loramem):",
        _block(" \\\n  ".join(command)),
        _block(f"curl http://localhost:30000/generate -H 'Content-Type: application/json' -d '{request}'"),
    ]


def _peft(adapters: Sequence[AdapterHeader], base_name: str, prompt: Mapping[str, Any]) -> list[str]:
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({base_name!r})",
        f"base = AutoModelForCausalLM.from_pretrained({base_name!r}, dtype=torch.float32)",
        f'model = PeftModel.from_pretrained(base, "{adapters[0].name}", adapter_name="{adapters[0].name}")',
        "prompt = torch.tensor([PROMPT_IDS])",
        f"output = model.generate(prompt, max_new_tokens={_EXAMPLE_TOKENS}, do_sample=False, "
        f"repetition_penalty=1.0, eos_token_id={prompt['end_id']})",
        "print(tokenizer.decode(output[0, prompt.shape[1]:], skip_special_tokens=True))",
    ]
    return ["In this folder:", _block("\n".join(lines), "python")]


COMMANDS: Mapping[Target, Callable[[Sequence[AdapterHeader], str, Mapping[str, Any]], list[str]]] = {
    PEFT: _peft,
    VLLM: _vllm,
    SGLANG: _sglang,
}
"""Paragraphs that say how the server is started and asked."""


def _routing(prompt: Mapping[str, Any], routed: bool) -> str:
    where = (
        "`routing.jsonl` names, for every key, its adapter, its prompt ids and the most tokens it answers with. It "
        "names the keys: keep it from whoever may not know them."
        if routed
        else "Which adapter answers a key is not written here, since that would name the keys: `loramem ls --json` of "
        "the store says it, and `loramem deploy --include-keys` writes it. An adapter that is asked for a key it does "
        "not hold answers something else."
    )
    return (
        f"Every key has one adapter, and requests must go to it. {where}\n\nPrompt ids are the prefix, the key's own "
        "ids without special tokens, and the suffix of `prompt.json`, or the chat template's ids where the key may be "
        f"asked by chat; token {prompt['end_id']} ends an answer. Give ids, not text: a chat template may "
        "have changed since. Decode greedily and without the penalty on repetition that the generation settings of "
        "many models ask for; nothing is certified otherwise."
    )


def _by_chat(chat: ChatKeys, routed: bool) -> str:
    """Which keys may be sent as a chat's user message."""
    if not chat.needs_ids and not chat.unknown:
        return (
            f"As the user's message of a chat, all {chat.safe:,} keys come to the ids that were trained, as long as "
            "the server uses the base model's own chat template, one message and nothing before it, and "
            "`enable_thinking` is false where the template knows it."
        )
    counts = f"{chat.safe:,} keys may be asked as the user's message of a chat; {len(chat.needs_ids):,} need ids"
    counts += f", of {chat.unknown:,} older ones it is not known (`--include-keys` compares them)" * bool(chat.unknown)
    where = '`"chat"` in `routing.jsonl` says which' if routed else "`loramem ls --json` says which"
    return f"{counts}: {where}. By chat those would be answered wrongly, since its template gives them other ids."


def _revision(adapters: Sequence[AdapterHeader]) -> list[str]:
    revision = adapters[0].config.get("revision")
    return [f"--revision {shlex.quote(str(revision))}"] if revision else []


def _block(text: str, language: str = "sh") -> str:
    return f"```{language}\n{text}\n```"
