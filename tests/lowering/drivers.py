"""What stands for CUDA's driver in tests."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any


@dataclass
class NotingDriver:
    """Notes launches: what does not change, with the stream, and the bytes of the parameters."""

    launches: list[tuple[tuple[int, ...], bytes]] = field(default_factory=list)
    result: int = 0

    def cuLaunchKernel(self, *arguments: Any) -> int:  # noqa: N802
        *fixed, pointers, extra = arguments
        assert pointers is None
        of_buffer, buffer, of_size, size, end = extra
        assert (of_buffer, of_size, end) == (1, 2, None)
        length = ctypes.c_size_t.from_address(size).value
        self.launches.append((tuple(fixed), ctypes.string_at(buffer, length)))
        return self.result

    def cuGetErrorString(self, result: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"no such thing"
        return 0
