"""The identity of models in memory, whatever file they are from: hashes of weights and of plain values."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from opensoraplan.device import dtype_name
from opensoraplan.fingerprint import hash_text


def plain(value: object) -> str:
    """A value of plain types as text, the same for equal ones."""
    return json.dumps(value, sort_keys=True)


def hash_plain(value: object) -> str:
    """Hash of a value of plain types, 32 hexadecimal digits."""
    return hash_text(plain(value))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and every byte, in several threads: hashing lets go of the interpreter."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        digests = executor.map(_hash_tensor, (tensors[name] for name in names))
        return hash_text("\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True)))


def _hash_tensor(tensor: Tensor) -> str:
    here = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{dtype_name(here.dtype)} {list(here.shape)} ".encode(), digest_size=16)
    digest.update(here.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
