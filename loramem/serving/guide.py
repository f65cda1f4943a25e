"""The README of a deployed folder: how the server is started, how it is asked, what was not tried."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from loramem.models.adapter_header import AdapterHeader
from loramem.results import ChatKeys, Finding
from loramem.serving.rules import SGLANG_BATCH, max_rank_option
from loramem.serving.targets import LLAMA_CPP, NAMES, PEFT, SGLANG, VLLM, Target

Routing = Literal["keys", "digests", "nowhere"]
KEYS: Final = "keys"
DIGESTS: Final = "digests"
NOWHERE: Final = "nowhere"
"""Where a deployed folder says which adapter answers which key."""


@dataclass(frozen=True)
class Asking:
    """How the adapters are asked."""

    prompt: Mapping[str, Any]
    """Fields of `loramem.records.prompts.PromptTemplate`."""
    max_tokens: int
    """Of the longest answer, the end token included."""
    chat: ChatKeys | None
    """Which keys may be asked by chat; None without a chat template."""
    routing: Routing

    @property
    def end_id(self) -> int:
        return int(self.prompt["end_id"])


def guide(
    adapters: Sequence[AdapterHeader], target: Target, base_name: str, asking: Asking, notes: Sequence[Finding]
) -> str:
    """Markdown for whoever starts the server.

    Args:
        base_name: The model name or path that it is started with.
        notes: What the rules say beyond that it loads.
    """
    kind = "file is one adapter in GGUF" if target == LLAMA_CPP else "folder is one adapter in PEFT format"
    paragraphs = [
        f"# {len(adapters)} LoRA adapters of `{base_name}` for {NAMES[target]}",
        f"Written by `loramem deploy`. Each {kind}; its name is its id in the store. They hold facts verbatim: whoever "
        "has them can extract them.",
        *COMMANDS[target](adapters, base_name, asking),
        _routing(asking),
        *([_by_chat(asking.chat, asking.routing == KEYS)] if asking.chat else []),
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
        *([] if target == PEFT else [_proof(target)]),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _vllm(adapters: Sequence[AdapterHeader], base_name: str, asking: Asking) -> list[str]:
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
        f'"repetition_penalty": 1, "max_tokens": {asking.max_tokens}, "stop_token_ids": [{asking.end_id}]}}'
    )
    return [
        "In this folder (vLLM 0.32 was run so, on a CPU):",
        _block(" \\\n  ".join(command)),
        "The name after `vllm serve` must be the one in the adapters' `base_model_name_or_path`, letter by letter; "
        "`--served-model-name` may be another. An adapter is loaded when it is first asked for:",
        _block(f"curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{request}'"),
        "Offline (`HF_HUB_OFFLINE=1`) vLLM turns a Hub id into the path of its snapshot before the resolver compares "
        "the two, and passes the adapters over: write them with `--base-name` and that path, or name them at the "
        "start in place of the three variables:",
        _block("--lora-modules " + " ".join(f"{adapter.name}=./{adapter.name}" for adapter in adapters)),
        "The resolver joins the model's name of a request to this folder: `../x` loads what lies outside it. Whoever "
        "may ask this server may load any adapter that its user can read; with `--lora-modules` alone they may not.",
    ]


def _sglang(adapters: Sequence[AdapterHeader], base_name: str, asking: Asking) -> list[str]:
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
        f'"repetition_penalty": 1, "max_new_tokens": {asking.max_tokens}, "stop_token_ids": [{asking.end_id}]}}}}'
    )
    return [
        "In this folder (written from SGLang's documentation and sources; not run by loramem):",
        _block(" \\\n  ".join(command)),
        _block(f"curl http://localhost:30000/generate -H 'Content-Type: application/json' -d '{request}'"),
    ]


def _peft(adapters: Sequence[AdapterHeader], base_name: str, asking: Asking) -> list[str]:
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({base_name!r})",
        f"base = AutoModelForCausalLM.from_pretrained({base_name!r}, dtype=torch.float32)",
        f'model = PeftModel.from_pretrained(base, "{adapters[0].name}", adapter_name="{adapters[0].name}")',
        "prompt = torch.tensor([PROMPT_IDS])",
        f"output = model.generate(prompt, max_new_tokens={asking.max_tokens}, do_sample=False, "
        f"repetition_penalty=1.0, eos_token_id={asking.end_id})",
        "print(tokenizer.decode(output[0, prompt.shape[1]:], skip_special_tokens=True))",
    ]
    return ["In this folder:", _block("\n".join(lines), "python")]


def _llama_cpp(adapters: Sequence[AdapterHeader], base_name: str, asking: Asking) -> list[str]:
    files = ",".join(f"{adapter.name}.gguf:0" for adapter in adapters)
    command = [f"llama-server -m {shlex.quote(base_name)}", f"--lora-scaled {files}", "--cache-ram 0"]
    request = (
        f'{{"prompt": [PROMPT IDS], "lora": [{{"id": 0, "scale": 1}}], "temperature": 0, "repeat_penalty": 1, '
        f'"cache_prompt": false, "n_predict": {asking.max_tokens}}}'
    )
    return [
        "In this folder (run by loramem through the package xllamacpp):",
        _block(" \\\n  ".join(command)),
        _block(f"curl http://localhost:8080/completion -H 'Content-Type: application/json' -d '{request}'"),
        f"The number in `lora` is the adapter's place after `--lora-scaled`, from 0 (here {adapters[0].name}); "
        "`curl http://localhost:8080/lora-adapters` lists them. Four things go wrong in silence:",
        "- Scales begin at 1 with `--lora`, and with `--lora-init-without-apply` too: all adapters at once answer "
        "every request that names none. `--lora-scaled FILE:0` begins at 0.\n"
        "- The prompt cache mixes adapters: a prompt that one adapter answered, asked of another, goes on from what "
        'the first computed. `"cache_prompt": false` in every request, and `--cache-ram 0`.\n'
        "- A number in `lora` that no adapter has is passed over, and the base model answers.\n"
        "- An adapter of another base model of the same shape loads. `base_fingerprint` in `prompt.json` says which it "
        "is (SHA-256; of a GGUF base, of the file).",
        f"An answer is whole when `stop_type` is `eos`: token {asking.end_id} must be one that the base's file ends "
        "generation at.",
    ]


COMMANDS: Mapping[Target, Callable[[Sequence[AdapterHeader], str, Asking], list[str]]] = {
    PEFT: _peft,
    VLLM: _vllm,
    SGLANG: _sglang,
    LLAMA_CPP: _llama_cpp,
}
"""Paragraphs that say how the server is started and asked."""


def _routing(asking: Asking) -> str:
    where = {
        KEYS: "`routing.jsonl` names, for every key, its adapter, its prompt ids and the most tokens it answers with. "
        "It names the keys: keep it from whoever may not know them (only its owner can read it).",
        DIGESTS: "`routing.jsonl` has a line per record: its adapter, the most tokens it answers with, and a digest, "
        "`sha256(json.dumps([salt, namespace, key]))` in Python's spelling. Whoever knows a key finds its line; "
        "whoever guesses keys can try them.",
        NOWHERE: "Which adapter answers a key is not written here, since that would name the keys: `loramem ls --json` "
        "of the store says it, `loramem deploy --include-keys` writes it, `--hash-keys` writes it under digests. An "
        "adapter that is asked for a key it does not hold answers something else.",
    }[asking.routing]
    return (
        f"Every key has one adapter, and requests must go to it. {where}\n\nPrompt ids are the prefix, the key's own "
        "ids without special tokens, and the suffix of `prompt.json`, or the chat template's ids where the key may be "
        f"asked by chat; token {asking.end_id} ends an answer, of which the longest has {asking.max_tokens} tokens "
        "with it: fewer cut it. Give ids, not text: a chat template may have changed since. Decode greedily and "
        "without the penalty on repetition that the generation settings of many models ask for; nothing is certified "
        "otherwise."
    )


def _proof(target: Target) -> str:
    command = f"loramem check --server URL --target {target}"
    return (
        "What a certificate is worth where it is served, only the server can tell: its kernels round otherwise, and so "
        f"do quantised weights. `{command}` in the store's folder asks for every key and compares."
    )


ALONE = (
    "**The key must be the one and only message: with a system message or an earlier turn before it, no key is "
    "answered rightly.**"
)


def _by_chat(chat: ChatKeys, routed: bool) -> str:
    """Which keys may be sent as a chat's user message."""
    if not chat.needs_ids and not chat.unknown:
        return (
            f"As the user's message of a chat, all {chat.safe:,} keys come to the ids that were trained, as long as "
            f"the server uses the base model's own chat template, and `enable_thinking` is false where the template "
            f"knows it. {ALONE}"
        )
    counts = f"{chat.safe:,} keys may be asked as the user's message of a chat; {len(chat.needs_ids):,} need ids"
    counts += f", of {chat.unknown:,} older ones it is not known (`--include-keys` compares them)" * bool(chat.unknown)
    where = '`"chat"` in `routing.jsonl` says which' if routed else "`loramem ls --json` says which"
    return (
        f"{counts}: {where}. By chat those would be answered wrongly, since its template gives them other ids. {ALONE}"
    )


def _revision(adapters: Sequence[AdapterHeader]) -> list[str]:
    revision = adapters[0].config.get("revision")
    return [f"--revision {shlex.quote(str(revision))}"] if revision else []


def _block(text: str, language: str = "sh") -> str:
    return f"```{language}\n{text}\n```"
