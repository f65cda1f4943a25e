"""Who loads adapters: the servers that are known here. Names alone, so that asking for one imports nothing."""

from collections.abc import Mapping
from typing import Final, Literal, get_args

Target = Literal["peft", "vllm", "sglang"]
PEFT: Final = "peft"
VLLM: Final = "vllm"
SGLANG: Final = "sglang"
TARGETS: tuple[Target, ...] = get_args(Target)
NAMES: Mapping[Target, str] = {PEFT: "PEFT", VLLM: "vLLM", SGLANG: "SGLang"}
