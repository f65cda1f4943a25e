"""A digest of a model's parameters as they were loaded, so that no fault of a loader hides behind hashes of files.

Half a second per gigabyte: it is made at every load.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


def parameters_sha256(model: nn.Module) -> str:
    """SHA-256 over dtype, shape and bytes of all parameters and saved buffers, tied ones once.

    They are taken in the order in which the model has them, not by name: releases of transformers rename what stays
    the same, and two tensors that changed places show in the order too. Buffers that are computed and not saved
    (rotary frequencies) are left out: their last bit depends on the processor. LoRA matrices are none of the base's.
    """
    state = model.state_dict(keep_vars=True)
    kept = {id(tensor): tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and not _of_lora(name)}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return hashlib.sha256("\n".join(pool.map(_described, kept.values())).encode()).hexdigest()


def _of_lora(name: str) -> bool:
    return ".lora_" in name


def _described(tensor: Tensor) -> str:
    # As bytes, since numpy has no bfloat16; on the CPU without a copy.
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content.data).hexdigest()}"
