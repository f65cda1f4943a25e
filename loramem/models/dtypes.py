"""The dtypes that base models are computed in, and adapters are served in, by name. No torch."""

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16", "q8_0"]
"""The last one is no dtype of torch: float32, with weights and inputs of linear modules as they come out of eight bits,
which is what llama.cpp computes on a processor of a file in Q8_0. Adapters are served in it, no store is written in it.
"""
SERVED: tuple[Dtype, ...] = get_args(Dtype)
DTYPES: tuple[Dtype, ...] = SERVED[:-1]
DtypeChoice = Dtype | Literal["auto"]
"""As asked for: "auto" leaves it to the store, or to the device."""
