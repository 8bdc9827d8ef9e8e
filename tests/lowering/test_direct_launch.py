"""Launches by CUDA's driver: what it is given, and what is left to Triton's launcher."""

from __future__ import annotations

import struct
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structfly.lowering import cuda_driver, direct_launch, launch
from structfly.lowering.block_products import matrices
from structfly.lowering.block_products.matrices import matrix_products
from structfly.lowering.block_products.matrix_tiles import FEW_TOKENS
from structfly.lowering.descriptor import rounds_to_tf32
from structfly.lowering.direct_launch import arguments_of, direct_kernel
from structfly.lowering.tuning.choice import SAFE
from tests.lowering.drivers import NotingDriver

BOX = "tensordesc<bf16[64, 32]>"
METADATA = {
    "num_ctas": 1,
    "num_warps": 4,
    "shared": 1024,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "tensordesc_meta": [{"swizzle": 3}],
    "target": SimpleNamespace(backend="cuda"),
}
SIGNATURE = {"a": BOX, "start": "i32", "y": "*fp32", "one": "constexpr", "eps": "fp32", "B": "constexpr"}
PLACES = [(0, 128), (128, 4), (132, 4), (136, 8), (144, 8), (152, 4), (160, 8), (168, 4), (176, 8), (184, 8)]
FUNCTION, STREAM = 77, 99


class TensorMap:
    """Ends with 128 bytes, as Triton's object does: the addresses of sixteen objects."""

    __slots__ = tuple(f"part{i:02}" for i in range(16))

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, object())

    @property
    def bytes(self) -> bytes:
        return struct.pack("16Q", *(id(getattr(self, name)) for name in self.__slots__))


@dataclass
class Driver(NotingDriver):
    """Knows where a kernel's parameters lie, too."""

    places: list[tuple[int, int]] = field(default_factory=lambda: list(PLACES))

    def cuFuncGetParamInfo(self, function: int, number: int, offset: Any, size: Any) -> int:  # noqa: N802
        assert function == FUNCTION
        if number == len(self.places):
            return 1
        offset._obj.value, size._obj.value = self.places[number]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    for module in (cuda_driver, direct_launch):
        monkeypatch.setattr(module, "driver", lambda: made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    active = SimpleNamespace(get_current_stream=lambda device: STREAM + device)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=active))
    return made


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[TensorMap]:
    """The maps that Triton encoded."""
    made: list[TensorMap] = []

    def encode(descriptor: Any, metadata: Any) -> list[Any]:
        rounded = {"elem_type": 11} if rounds_to_tf32(descriptor) else {}
        assert metadata == {"swizzle": 3, **rounded}
        made.append(TensorMap())
        return [made[-1], *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", encode)
    return made


def compiled(signature: dict[str, str] = SIGNATURE, **changed: Any) -> Any:
    asm = {"ptx": changed.pop("ptx", "ret;")}
    metadata, source = SimpleNamespace(**{**METADATA, **changed}), SimpleNamespace(signature=signature)
    return SimpleNamespace(function=FUNCTION, metadata=metadata, src=source, asm=asm, run=None)


@dataclass(eq=False)
class Descriptor:
    """Stands for a tensor descriptor of matrices with 640 columns."""

    address: int
    rows: int
    round_f32_to_tf32: bool = False
    strides = (640, 1)
    padding = "zero"

    @property
    def base(self) -> Any:
        return SimpleNamespace(data_ptr=lambda: self.address)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, 640


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 3), (0, 4), (4, 0), (5, 0)])
def test_the_driver_is_given_what_the_kernel_declares(
    driver: Driver, maps: list[TensorMap], first: int, last: int
) -> None:
    """Whatever of it stays the same from launch to launch."""
    kernel = direct_kernel(compiled())
    assert kernel is not None
    rows = (100, 100, 101) if first == last == 0 else (100, 100)
    calls: list[tuple[Any, ...]] = [(Descriptor(1024, n), 5 - step, 4096, 1, 0.5) for step, n in enumerate(rows)]
    calls = [(*calls[0][:first], *call[first : 5 - last], *calls[0][5 - last :]) for call in calls]
    run = kernel.bind((132, 2, 1), calls[0][:first], 5 - first - last, calls[0][5 - last :])
    for call in calls:
        run(*call[first : 5 - last])
    assert len(maps) == len(set(rows))  # the same descriptor is not encoded again, another size is
    for (fixed, given), (box, start, address, *_) in zip(driver.launches, calls, strict=True):
        assert fixed == (FUNCTION, 132, 2, 1, 128, 1, 1, 1024, STREAM)
        numbers = struct.pack("@iiqqi4xQf4xQQ", *box.shape, *box.strides, start, address, 0.5, 0, 0)
        assert given == maps[box.shape[0] - 100].bytes + numbers  # ending with scratch spaces that are not there


def test_a_map_that_rounds_to_tf32_is_another(driver: Driver, maps: list[TensorMap]) -> None:
    kernel = direct_kernel(compiled())
    assert kernel is not None
    run = kernel.bind((1, 1, 1), (), 5, ())
    for rounded in (False, True, False):
        run(Descriptor(1024, 100, rounded), 1, 4096, 1, 0.5)
    assert len(maps) == 2
    assert [packed[:128] == maps[1].bytes for _, packed in driver.launches] == [False, True, False]


def test_kernels_that_are_bound_twice_do_not_mix_their_parameters(driver: Driver, maps: list[TensorMap]) -> None:
    kernel = direct_kernel(compiled())
    assert kernel is not None
    one, other = (
        kernel.bind((grid, 1, 1), (Descriptor(1024, rows),), 1, (64, 1, 0.5)) for grid, rows in ((1, 9), (2, 8))
    )
    for start in (1, 2):
        one(start)
        other(-start)
    given = [(fixed[1], *struct.unpack("@iiqqi", packed[128:156])) for fixed, packed in driver.launches]
    assert given == [(1, 9, 640, 640, 1, 1), (2, 8, 640, 640, 1, -1), (1, 9, 640, 640, 1, 2), (2, 8, 640, 640, 1, -2)]


def test_a_launch_that_was_made_ready_is_left_to_triton_while_triton_has_hooks(
    driver: Driver, maps: list[TensorMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    by_triton: list[tuple[Any, ...]] = []

    class Compiled(SimpleNamespace):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments: by_triton.append((grid, *arguments))

    class Kernel:
        def warmup(self, *_: Any, **__: Any) -> Compiled:
            return Compiled(**vars(compiled({"start": "i32", "y": "*fp32", "B": "constexpr"})))

    driver.places = [(0, 4), (8, 8), (16, 8), (24, 8)]
    run, y = launch.Launch(Kernel(), (3,), {"B": 16}, num_warps=4), torch.empty(2)
    run(5, y)
    with monkeypatch.context() as during:
        during.setattr(knobs.runtime, "launch_enter_hook", lambda _: None)
        run(6, y)
    run(7, y)
    assert [struct.unpack("@iQQQ", packed)[:2] for _, packed in driver.launches] == [
        (5, y.data_ptr()),
        (7, y.data_ptr()),
    ]
    assert by_triton == [((3, 1, 1), 6, y, 16)]


def test_only_kernels_that_wait_themselves_start_early(driver: Driver, maps: list[TensorMap]) -> None:
    for ptx in ("ret;", "griddepcontrol.wait; ret;"):
        kernel = direct_kernel(compiled(ptx=ptx))
        assert kernel is not None
        kernel.bind((1, 1, 1), (), 5, ())(Descriptor(1024, 100), 1, 4096, 1, 0.5)
    assert driver.early == [False, True]


def test_nothing_of_a_launch_is_kept(driver: Driver, maps: list[TensorMap]) -> None:
    kernel = direct_kernel(compiled())
    assert kernel is not None
    run = kernel.bind((1, 1, 1), (), 5, ())
    given = Descriptor(1024, 100)
    gone = weakref.ref(given)
    run(given, 1, 64, 1, 0.5)
    del given
    assert gone() is None


def test_no_program_is_no_launch(driver: Driver, maps: list[TensorMap]) -> None:
    kernel = direct_kernel(compiled())
    assert kernel is not None
    kernel.bind((4, 0, 1), (), 5, ())(Descriptor(1024, 100), 1, 4096, 1, 0.5)
    assert not driver.launches


def test_what_the_driver_refuses_is_an_error(driver: Driver, maps: list[TensorMap]) -> None:
    driver.result = 700
    kernel = direct_kernel(compiled())
    assert kernel is not None
    with pytest.raises(RuntimeError, match="the launch of a kernel failed: CUDA error 700, no such thing"):
        kernel.bind((1, 1, 1), (), 5, ())(Descriptor(1024, 100), 1, 4096, 1, 0.5)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_ctas": 2},
        {"global_scratch_size": 128},
        {"profile_scratch_size": 128},
        {"launch_cooperative_grid": True},
        {"launch_pdl": True},
        {"tensordesc_meta": None},
        {"signature": {**SIGNATURE, "eps": "fp16"}},
        {"signature": {**SIGNATURE, "more": "i32"}},
        {"signature": {**SIGNATURE, "start": "i64"}},
        {"target": SimpleNamespace(backend="hip")},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_not_known_is_left_to_triton(driver: Driver, changed: dict[str, Any]) -> None:
    assert direct_kernel(compiled()) is not None
    assert direct_kernel(compiled(**changed)) is None


def test_where_there_is_no_driver_all_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_launch, "driver", lambda: None)
    assert direct_kernel(compiled()) is None


def test_a_descriptor_has_a_map_and_numbers_for_each_of_its_sides() -> None:
    arguments = arguments_of(["constexpr", "tensordesc<fp32[1, 16, 8]>"], [{}])
    assert arguments is not None
    assert [(each.position, each.sizes) for each in arguments] == [(1, [128, 4, 4, 4, 8, 8, 8])]


@pytest.mark.gpu
def test_products_are_launched_by_the_driver_unless_triton_has_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(launch, "_COMPILED", {})
    matrices._products.cache_clear()
    bound: list[str] = []
    real = direct_launch.DirectKernel.bind

    def bind(self: direct_launch.DirectKernel, *arguments: Any) -> Any:
        bound.append("driver")
        return real(self, *arguments)

    monkeypatch.setattr(direct_launch.DirectKernel, "bind", bind)
    b = torch.randn(1, 1, 64, 64, device="cuda").bfloat16()
    made: list[torch.Tensor] = []
    entered: list[Any] = []
    for tokens in (100, 100, 70, 100):  # by the driver, and the last time by Triton
        if len(made) == 3:
            monkeypatch.setattr(knobs.runtime, "launch_enter_hook", entered.append)
        torch.manual_seed(tokens)
        a = torch.randn(tokens, 1, 1, 64, device="cuda").bfloat16()
        made.append(torch.empty_like(a))
        matrix_products(a, b, made[-1], tiles=SAFE)
        expected = (a.view(-1, 64).double() @ b.view(64, 64).double().t()).view_as(a)
        torch.testing.assert_close(made[-1].double(), expected, rtol=0.01, atol=0.01)
    assert bound == ["driver"] * 2  # for 100 tokens, and for 70
    assert len(entered) == 1
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[3])


@pytest.mark.gpu
def test_a_product_that_starts_early_reads_what_the_one_before_it_writes() -> None:
    """Few programs each, so that those of the next have multiprocessors to start on at once; all are launched while the
    device is busy with something else, so that it never waits for the host."""
    generator = torch.Generator("cuda").manual_seed(0)
    side, count = 1024, 12
    weights = [
        torch.randn(1, 1, side, side, generator=generator, device="cuda").bfloat16() / side**0.5 for _ in range(count)
    ]
    rows = [torch.randn(16, 1, 1, side, generator=generator, device="cuda").bfloat16()]
    rows += [torch.empty_like(rows[0]) for _ in weights]
    other = torch.zeros(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def run(*, apart: bool) -> list[torch.Tensor]:
        for each in rows[1:]:
            each.fill_(torch.nan)
        for _ in range(0 if apart else 4):
            other @ other
        for source, weight, made in zip(rows, weights, rows[1:], strict=False):
            matrix_products(source, weight, made, tiles=FEW_TOKENS)
            if apart:
                torch.cuda.synchronize()
        return [each.clone() for each in rows[1:]]

    expected = run(apart=True)
    torch.testing.assert_close(expected[0], rows[0] @ weights[0].mT, rtol=2e-2, atol=2e-2)
    for _ in range(50):
        assert all(map(torch.equal, run(apart=False), expected))
