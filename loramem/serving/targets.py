"""Who loads adapters: the servers that are known here. Names alone, so that asking for one imports nothing."""

from collections.abc import Mapping
from typing import Final, Literal, get_args

Target = Literal["peft", "vllm", "sglang", "llama.cpp"]
PEFT: Final = "peft"
VLLM: Final = "vllm"
SGLANG: Final = "sglang"
LLAMA_CPP: Final = "llama.cpp"
TARGETS: tuple[Target, ...] = get_args(Target)
NAMES: Mapping[Target, str] = {PEFT: "PEFT", VLLM: "vLLM", SGLANG: "SGLang", LLAMA_CPP: "llama.cpp"}

BaseType = Literal["F32", "F16", "Q8_0", "Q4_1"]
BASE_TYPES: tuple[BaseType, ...] = get_args(BaseType)
"""In which the matrices of a base model are written for llama.cpp; norms and biases stay in float32."""
