"""The layout of safetensors (https://github.com/huggingface/safetensors), of tensors that lie one behind the other.

The library of that name copies what it reads and builds a whole file in memory to write one; here neither is wanted.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from src.errors import Failure

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LONGEST_HEADER = 100_000_000  # as safetensors has it

Kind = tuple[str, torch.dtype, torch.Size]
"""Name, dtype and shape of a tensor."""


class Layout:
    """Where each of some tensors lies in one block of memory.

    Args:
        kinds: The tensors. Those with the largest elements lie first, so that each is aligned.

    Attributes:
        size: Bytes of the block.
    """

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self.kinds = kinds
        self._header: dict[str, Any] = {}
        end = 0
        for name, dtype, shape in sorted(kinds, key=lambda kind: -kind[1].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        self.size = end

    def views(self, block: Tensor) -> list[Tensor]:
        """Return the tensors in a block, uint8 ``[size]``, in the order they were given in."""
        views = []
        for name, dtype, shape in self.kinds:
            begin, end = self._header[name]["data_offsets"]
            views.append(block[begin:end].view(dtype).view(shape))
        return views

    def head(self, metadata: Mapping[str, str]) -> bytes:
        """Return all that a file holds before the block."""
        text = json.dumps({"__metadata__": dict(metadata), **self._header}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def parse(content: Any, *, verify: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, which share its memory, and its metadata.

    Args:
        content: The file, in a writable buffer.
        verify: Compare its tensors' bytes with the ``sha256`` of its metadata.

    Raises:
        Failure: If it is not in this layout, or its bytes are others.
    """
    try:
        (length,) = struct.unpack_from("<Q", content)
        begin, size = 8 + length, len(content) - 8 - length
        if length > _LONGEST_HEADER or size < 0:
            raise ValueError("the header is longer than the file")
        header = json.loads(bytes(content[8:begin]))
        metadata = header.pop("__metadata__", {})
        if verify and hashlib.sha256(memoryview(content)[begin:]).hexdigest() != metadata.get("sha256"):
            raise ValueError("SHA-256 differs")
        state = {}
        for name, entry in header.items():
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if not 0 <= start <= stop <= size or stop - start != count * dtype.itemsize or min(shape, default=0) < 0:
                raise ValueError(f"{name} does not fit")
            found = torch.frombuffer(content, dtype=dtype, count=count, offset=begin + start) if count else None
            state[name] = torch.empty(shape, dtype=dtype) if found is None else found.view(shape)
        return state, metadata
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError, RuntimeError) as error:
        raise Failure(f"these are no whole weights: {error}") from error
