"""The only module that names private parts of torch.

Checked against torch 2.11 and 2.13.  Everything else in structfly reaches these parts through the functions here,
so that a new torch release is one file's work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from types import FunctionType
from typing import Any, TypeVar, cast

import sympy
import torch
from torch import Tensor, fx
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass
from torch.utils._sympy.functions import FloorDiv

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# ------------------------------------------------------------------------------------------------ graph vocabulary


PAD: Callable[..., Tensor] = torch._C._nn.pad
"""What ``F.pad`` is in a Dynamo graph."""


def functorch_nesting(node: fx.Node) -> int:
    """+1 where a torch.func transform (grad, vmap, jvp) opens in the graph, -1 where one closes, else 0."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if not name.endswith("_nesting"):
        return 0
    if name.endswith("_increment_nesting"):
        return 1
    return -1 if name.endswith("_decrement_nesting") else 0


def batched(node: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """Of a node that gives a tensor to a vmap, or takes one back: the tensor, the dimension that is mapped over, and
    whether it gives."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name not in ("_add_batch_dim", "_remove_batch_dim"):
        return None
    gives = name == "_add_batch_dim"
    tensor, dim = node.args[0], node.args[1 if gives else 3]
    return (tensor, dim, gives) if isinstance(tensor, fx.Node) and isinstance(dim, int) else None


_CHECKPOINT_BODIES = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
_PLAIN_BODIES = ("invoke_subgraph",)


def sets_grad_mode(node: fx.Node) -> bool | None:
    """What a node switches the recording of gradients to, or None if it does not."""
    if node.op != "call_function" or node.target is not torch._C._set_grad_enabled:
        return None
    return bool(node.args[0])


def autocast_change(node: fx.Node) -> int:
    """+1 where an autocast region opens in the graph, -1 where one closes, else 0."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return {"_enter_autocast": 1, "_exit_autocast": -1}.get(name, 0)


def subgraph_kind(node: fx.Node) -> str | None:
    """What a node that carries graph bodies is: "checkpoint", "plain", its operator's name, or None without bodies."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    name = node.target.name()
    if name in _CHECKPOINT_BODIES:
        return "checkpoint"
    return "plain" if name in _PLAIN_BODIES else name


def written_arguments(node: fx.Node) -> list[Any] | None:
    """The arguments that an overload's schema declares as written, all of them for a kernel launch that mutates; None
    where there is no schema to read."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return [node.args, node.kwargs] if node.target.name().endswith("_mutation") else []
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = node.target._schema.arguments
    values = {**{argument.name: value for argument, value in zip(arguments, node.args, strict=False)}, **node.kwargs}
    return [values.get(argument.name) for argument in arguments if argument.is_write]


def size_checks(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that do nothing but check the sizes of ``node``, as Dynamo writes them for a size that data decides."""
    checks: list[fx.Node] = []
    for user in node.users:
        if user.target is torch.ops.aten.sym_size.int:
            compared = list(user.users)
            asserted = [other for each in compared for other in each.users]
            if all(each.target is torch.ops.aten._assert_scalar.default for each in asserted) and all(
                each.users for each in compared
            ):
                checks.extend((user, *compared, *asserted))
    return tuple(checks)


def storage_key(tensor: Tensor) -> int:
    """The same number for tensors that share memory; for a sparse tensor, which has no storage, its own.  Inside a vmap
    a tensor has that of the one that was given to it."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def version(tensor: Tensor) -> int:
    """How often the tensor, or a view of the same memory, was written in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def wrapper_subclass(tensor: Tensor) -> str:
    """The name of a tensor subclass that wraps other tensors (a DTensor, a quantised weight), or ""."""
    return type(tensor).__name__ if is_traceable_wrapper_subclass(tensor) else ""


def sees_operations() -> bool:
    """Whether something is to see each operation of torch: a torch.func transform, or a mode, as FLOP counters are."""
    return peek_interpreter_stack() is not None or is_in_torch_dispatch_mode()


def inside_functional_gradient() -> bool:
    """Whether torch.func.grad, vjp or jvp is the innermost transform that is at work."""
    innermost = peek_interpreter_stack()
    return innermost is not None and innermost.key() in (TransformType.Grad, TransformType.Jvp)


def source_of_input(node: fx.Node) -> str:
    """Where the user's program keeps an input, e.g. ``L['self']._modules['head']._parameters['weight']``, or ""."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_state(node: fx.Node) -> bool:
    """Whether an input is kept by a module or a global of the user's program: an argument of the compiled function, or
    an element of one, and a variable of an enclosing function, which looks the same, are not."""
    source = source_of_input(node)
    return bool(source) and re.fullmatch(r"L\['\w+'\](\[[^\]]*\])*", source) is None


def value_of_input(node: fx.Node) -> Tensor | None:
    """The tensor that an input was traced with, or None where there is none or it has no data."""
    value = getattr(node.meta.get("grapharg"), "example", None)
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta else None


def keep_sources(old: fx.GraphModule, new: fx.GraphModule, added: Iterable[fx.Node]) -> None:
    """Let ``new``, a copy of Dynamo's ``old``, say where its inputs come from, as AOTAutograd asks a graph of Dynamo's.

    That is how CUDA graphs tell parameters, whose addresses stay, from other inputs.  The addresses of ``added`` inputs
    stay, too; where one does not, a CUDA graph is recorded anew.
    """
    if not hasattr(old, "_param_name_to_source"):
        return
    new._param_name_to_source = old._param_name_to_source
    sources = {node.name: getattr(node, "_dynamo_source", None) for node in old.graph.find_nodes(op="placeholder")}
    for node in new.graph.find_nodes(op="placeholder"):
        node._dynamo_source = sources.get(node.name)
    for node in added:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph module like Dynamo's own: its Python code is generated when it is first called, if it ever is."""
    from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


# ------------------------------------------------------------------------------------------------ symbolic shapes


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """The size as a sympy expression; reading it adds no guard."""
    if isinstance(size, torch.SymInt):
        found = cast(sympy.Expr, size.node.expr)
        return found.replace(FloorDiv, _quotient) if found.has(FloorDiv) else found
    return sympy.Integer(size)


def _quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    """``size // divisor``, which torch leaves as it stands, without the division where nothing is left over."""
    exact = sympy.cancel(size / divisor)
    whole = exact.is_polynomial() and all(number.is_integer for number in exact.as_coefficients_dict().values())
    return cast(sympy.Expr, exact if whole else FloorDiv(size, divisor))


def size_hints(value: Tensor) -> dict[sympy.Symbol, int]:
    """The example values of the symbols in a tensor's shape; reading them adds no guard.

    A size that depends on data has none; Inductor's own guess stands for it.
    """
    from torch._inductor import config

    guess: int = config.unbacked_symint_fallback
    hints: dict[sympy.Symbol, int] = {}
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            environment = size.node.shape_env
            renamed = hasattr(environment, "backed_var_to_val")  # since torch 2.12
            known = environment.backed_var_to_val if renamed else environment.var_to_val
            for symbol in size.node.expr.free_symbols:
                hints[symbol] = int(known.get(symbol, guess))
    return hints


def size_hint(size: int | torch.SymInt) -> int | None:
    """The example value of a size, None for one that depends on data; reading it adds no guard."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def equal_sizes(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are equal; where only the example says so, with a guard."""
    hint = size_hint(one)
    return hint is not None and hint == size_hint(other) and bool(one == other)


def fake_mode_of(values: Iterable[object]) -> Any:
    """The fake mode that example values were made under, or None for real tensors."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextmanager
def example_mode(mode: Any) -> Iterator[None]:
    """Run operations on example values: under their fake mode, outside the compiler's trace, adding no guard."""
    with ExitStack() as stack:
        stack.enter_context(torch._guards.tracing(None))
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        yield


# ------------------------------------------------------------------------------------------------ run time


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail the running CUDA program if ``condition`` () is False, without waiting for the device."""
    torch._assert_async(condition, message)


def current_stream(device: torch.device) -> int:
    """The current stream of a CUDA device, as CUDA's driver has it."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))


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


# ------------------------------------------------------------------------------------------------ compiling


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: list[Any], options: Mapping[str, object]
) -> Callable[..., Any]:
    """Inductor on a Dynamo graph."""
    import torch._inductor

    return cast(Callable[..., Any], torch._inductor.compile(gm, example_inputs, options=dict(options) or None))


def inductor_modes() -> dict[str, dict[str, object]]:
    """Inductor's modes and the options each stands for."""
    import torch._inductor

    return cast(dict[str, dict[str, object]], torch._inductor.list_mode_options())


def inductor_options() -> frozenset[str]:
    """Names of all options Inductor knows."""
    import torch._inductor

    return frozenset(torch._inductor.list_options())


def inductor_option_type(name: str) -> Any:
    """The type, or union of types, that Inductor declares for an option."""
    from torch._inductor import config

    return config.get_type(name)  # type: ignore[attr-defined]


def original_callable(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the user wrote, under any torch.compile wrapping."""
    if isinstance(function, torch._dynamo.OptimizedModule):
        return cast(Callable[..., Any], function._orig_mod)
    return cast(Callable[..., Any], getattr(function, "_torchdynamo_orig_callable", function))


def constant_in_graphs(function: FunctionT) -> FunctionT:
    """Dynamo calls the function while it traces, and takes the result for a constant.

    As :func:`torch.compiler.assume_constant_result`, without importing Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def with_code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own, so that nothing compiled before answers for it.

    Its name is its own, too: by file, line and name Dynamo remembers which sizes varied, and takes them for dynamic.
    """
    if not isinstance(function, FunctionType):

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        fresh = cast(FunctionType, call)
    else:
        fresh = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        fresh.__kwdefaults__ = function.__kwdefaults__
    code = fresh.__code__
    fresh.__code__ = code.replace(co_name=f"{code.co_name}_{next(_NUMBERS)}")
    return fresh


_NUMBERS = count(1)


@contextmanager
def graph_breaks() -> Iterator[list[str]]:
    """Collects why Dynamo broke graphs while the context was open; filled when it closes."""
    from torch._dynamo.utils import graph_break_reasons

    start = len(graph_break_reasons)
    found: list[str] = []
    try:
        yield found
    finally:
        found.extend(str(reason.reason) for reason in graph_break_reasons[start:] if reason.graph_break)
