"""What a running program is asked and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail the running CUDA program if ``condition`` () is False, without waiting for the device."""
    torch._assert_async(condition, message)


def current_stream(device: torch.device) -> int:
    """The current stream of a CUDA device, as CUDA's driver has it."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def sees_operations() -> bool:
    """Whether something is to see each operation of torch: a torch.func transform, or a mode, as FLOP counters are."""
    return peek_interpreter_stack() is not None or is_in_torch_dispatch_mode()


def inside_functional_gradient() -> bool:
    """Whether torch.func.grad, vjp or jvp is the innermost transform that is at work."""
    innermost = peek_interpreter_stack()
    return innermost is not None and innermost.key() in (TransformType.Grad, TransformType.Jvp)


def unseen_by_modes() -> AbstractContextManager[object]:
    """No dispatch mode sees operations in this context."""
    return torch._C._DisableTorchDispatch()


def register_autograd(op: Any, differentiate: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """:func:`torch.library.register_autograd`, in less of the host's time for an op of many arguments.

    torch's own looks each argument's default up in a list of all, which it makes anew every time: a call's time grows
    with the square of the arguments.

    Args:
        op: an overload of which no argument has a default or is named only.
        differentiate: takes the context, whether each of the op's arguments needs a gradient, and the gradients of its
            outputs; returns those of its arguments.
        setup_context: takes the context, the op's arguments and its outputs.
    """

    def below(keys: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
            output = below(keys, arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return None, *differentiate(ctx, ctx.needs_input_grad[1:], *upstream)

    def call(keys: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Formula.apply(keys, *arguments)  # type: ignore[no-untyped-call]
        return below(keys, arguments)

    _LIBRARY.impl(op.name().removeprefix("structfly::"), call, "Autograd", with_keyset=True)


_LIBRARY = torch.library.Library("structfly", "FRAGMENT")


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Record gradients inside an op's kernel, which runs below autograd."""
    keys = torch._C.DispatchKey
    recorded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
        recorded = recorded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch.inference_mode(False), torch._C._ForceDispatchKeyGuard(included, recorded), torch.enable_grad():
        yield
