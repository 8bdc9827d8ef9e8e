"""What stands for CUDA's driver in tests."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, field
from typing import Any


@dataclass
class NotingDriver:
    """Notes launches: what does not change, with the stream, and the bytes of the parameters."""

    launches: list[tuple[tuple[int, ...], bytes]] = field(default_factory=list)
    early: list[bool] = field(default_factory=list)
    """Of each launch, whether it may start before those ahead of it end."""
    result: int = 0

    def cuLaunchKernelEx(self, config: int, function: int, pointers: None, extra: Any) -> int:  # noqa: N802
        assert pointers is None
        of_buffer, buffer, of_size, size, end = extra
        assert (of_buffer, of_size, end) == (1, 2, None)
        *numbers, stream, attributes, count = struct.unpack("@7IPPI", ctypes.string_at(config, 52))
        if count:
            assert struct.unpack("@IxxxxI", ctypes.string_at(attributes, 12)) == (6, 1)  # stream serialization
        self.early.append(bool(count))
        length = ctypes.c_size_t.from_address(size).value
        self.launches.append(((function, *numbers, stream), ctypes.string_at(buffer, length)))
        return self.result

    def cuGetErrorString(self, result: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"no such thing"
        return 0
