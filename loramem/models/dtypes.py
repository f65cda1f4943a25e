"""The dtypes that base models are computed in, and adapters are served in, by name. No torch."""

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DtypeChoice = Dtype | Literal["auto"]
"""As asked for: "auto" leaves it to the store, or to the device."""
