"""Tables of tiles: found for what they are for, kept whole, read once, and wrong ones refused with the reason."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structfly.errors import ConfigError, StructflyError
from structfly.lowering.gemm import TORCH_MM, Cut, Tiles
from structfly.lowering.tuning import choice
from structfly.lowering.tuning.choice import INTERPRETED, SAFE, choices_are_made, shipped_tiles_for, tiles_for
from structfly.lowering.tuning.limits import why_not
from structfly.lowering.tuning.products import KINDS, ProductClass, size_class
from structfly.lowering.tuning.table import Table, read_user_table, shipped_tables, user_path, write_user_table
from structfly.records import DeviceModel
from tests.lowering.tuning.conftest import forget
from tests.patterns.linear_cross_entropy.test_menu import choose

pytestmark = pytest.mark.usefixtures("cache")

H100 = DeviceModel("NVIDIA H100 80GB HBM3", (9, 0))
OTHER_TILES = Tiles(m=128, n=128, k=64, group=8, parts=2, warps=4, stages=3)


def product(template: str = "linear_cross_entropy_sum", device: DeviceModel = H100, **options: Any) -> ProductClass:
    fields = {"hooks": (), "dtype": "bfloat16", "layout": "nn", "m": None, "n": 2048, "k": None}
    return ProductClass(device, template, **{**fields, **options})


@st.composite
def products(draw: st.DrawFn) -> ProductClass:
    template = draw(st.sampled_from(sorted(KINDS)))
    sizes = st.none() | st.integers(0, 20).map(lambda exponent: 2**exponent)
    return ProductClass(
        draw(st.sampled_from((H100, DeviceModel("NVIDIA H200", (9, 0)), DeviceModel("NVIDIA A100", (8, 0))))),
        template,
        tuple(sorted(draw(st.sets(st.sampled_from(KINDS[template].hooks))) if KINDS[template].hooks else ())),
        "bfloat16",
        draw(st.sampled_from(("nn", "nt", "tn", "tt"))),
        *(draw(sizes) for _ in "mnk"),
    )


@given(chosen=st.lists(products(), unique=True, max_size=6), other=products())
def test_what_is_written_is_found_again(chosen: list[ProductClass], other: ProductClass) -> None:
    some: list[Cut] = [replace(SAFE, group=group + 1) for group in range(len(chosen))]
    if chosen and KINDS[chosen[0].template].torch_mm:
        some[0] = TORCH_MM
    write_user_table(Table().with_choices(list(zip(chosen, some, strict=True))))
    table = read_user_table()
    for each, tiles in zip(chosen, some, strict=True):
        assert table.find(each) == tiles
    if (found := table.find(other)) is not None:  # an entry for any size, or for its very class
        entry = chosen[some.index(found)]
        for name in ("device", "template", "hooks", "layout"):
            assert getattr(entry, name) == getattr(other, name)
        for name in "mnk":
            assert getattr(entry, name) in (None, getattr(other, name))


def test_a_choice_replaces_the_earlier_one_and_no_other() -> None:
    first, second = product(n=2048), product(n=4096)
    table = Table().with_choices([(first, SAFE), (second, SAFE)]).with_choices([(first, OTHER_TILES)])
    assert len(table.products) == 2
    assert (table.find(first), table.find(second)) == (OTHER_TILES, SAFE)


def test_the_entry_that_names_most_counts() -> None:
    entry = {"template": "linear_cross_entropy_sum", "capability": "9.0"}
    tiles = [{**OTHER_TILES.__dict__, "group": group} for group in (1, 2, 3)]
    entries = [{**entry, "tiles": tiles[0]}, {**entry, "n": 2048, "layout": "nn", "tiles": tiles[1]}]
    entries.append({**entry, "n": 2048, "tiles": tiles[2]})
    user_path().write_text(json.dumps({"products": entries}))
    for number, (n, layout) in enumerate(((64, "nn"), (2048, "nn"), (2048, "tn"))):
        assert tiles_for(product(n=n, layout=layout)) == Tiles(**tiles[number])


def test_the_users_table_comes_before_the_shipped_one_and_that_before_what_runs_anywhere() -> None:
    tuned, shipped = product(n=2048), product(n=4096)
    write_user_table(Table().with_choices([(tuned, OTHER_TILES)]))
    assert tiles_for(tuned) == OTHER_TILES
    assert shipped_tiles_for(tuned) == tiles_for(shipped) == Tiles(128, 256, 64, group=4, parts=2, warps=8, stages=3)
    assert tiles_for(product(device=DeviceModel("NVIDIA A100", (8, 0)))) == SAFE
    assert tiles_for(product(device=DeviceModel("CPU", None))) == INTERPRETED


def test_a_choice_stays_what_it_was() -> None:
    assert not choices_are_made()
    before = tiles_for(product(n=2048))
    assert choices_are_made()
    write_user_table(Table().with_choices([(product(n=n), OTHER_TILES) for n in (2048, 4096)]))
    assert tiles_for(product(n=2048)) == tiles_for(product(n=4096)) == before
    forget()  # a process that starts later
    assert tiles_for(product(n=2048)) == OTHER_TILES


def test_tiles_of_the_interpreter_read_no_table() -> None:
    user_path().write_text("no table")
    assert tiles_for(product(device=DeviceModel("CPU", None))) == INTERPRETED
    assert not choices_are_made()


def test_what_is_shipped_is_supported() -> None:
    templates = {entry.template for table in shipped_tables() for entry in table.products}
    assert templates == set(KINDS)  # reading them has checked their tiles
    for template in KINDS:
        assert not why_not(template, SAFE, (0, 0))


GOOD = {
    "template": "linear_cross_entropy_sum",
    "capability": "9.0",
    "tiles": {"m": 128, "n": 256, "k": 64, "group": 4, "parts": 2, "warps": 8, "stages": 3},
}


def changed(*, tiles: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields, "tiles": {**GOOD["tiles"], **(tiles or {})}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON: EOF"),
        ([], "Input should be an object"),
        ({"format": 2}, "format is 2; allowed: 1"),
        ({"entries": []}, "entries is unknown; allowed: format, products"),
        ({"products": [{}]}, "products[0].template is missing"),
        (changed(tiles={"m": 100}), "products[0].tiles.m is 100; allowed: a power of two"),
        (changed(tiles={"n": 512}), "products[0].tiles.n is 512; Input should be less than or equal to 256"),
        (changed(tiles={"k": "64"}), "products[0].tiles.k is '64'; Input should be a valid integer"),
        (changed(tiles={"warps": 3}), "products[0].tiles.warps is 3; allowed: 1, 2, 4, 8 or 16"),
        (
            changed(tiles={"depth": 3}),
            "products[0].tiles.depth is unknown; allowed: m, n, k, group, parts, warps, stages",
        ),
        (
            changed(tiles={"parts": 1}),
            "products[0]: tiles: parts is 1; allowed for linear_cross_entropy_sum: 2 or more",
        ),
        (changed(tiles={"n": 32, "parts": 4}), "parts is 4, which leaves 8 of n's 32 columns; at least 16"),
        ({**GOOD, "library": "torch.mm"}, "products[0]: tiles and library are both there; give one"),
        ({"template": "linear_cross_entropy_sum", "capability": "9.0"}, "products[0]: tiles is missing"),
        (
            {"template": "linear_cross_entropy_sum", "capability": "9.0", "library": "torch.mm"},
            "library: torch.mm cannot make linear_cross_entropy_sum; it can make linear_cross_entropy_hidden",
        ),
        (
            {"template": "linear_cross_entropy_hidden", "capability": "9.0", "library": "cutlass"},
            "products[0].library is 'cutlass'; allowed: 'torch.mm'",
        ),
        (changed(tiles={"k": 128}), "k is 128; allowed for linear_cross_entropy_sum: up to 64"),
        (changed(tiles={"m": 256}), "m n is 65536; allowed: up to 32768"),
        (
            changed(tiles={"stages": 4}),
            "shared memory and capability 9.0 has 232448; smaller m, n, k, stages or resident",
        ),
        (changed(capability="8.9"), "shared memory and capability 8.9 has 101376"),
        (
            changed(template="linear_cross_entropy_block", tiles={"m": 32}),
            "m is 32; allowed for linear_cross_entropy_block: 64 or more",
        ),
        (
            changed(capability="nine"),
            "products[0].capability is 'nine'; allowed: a compute capability, such as \"9.0\"",
        ),
        (changed(template="gemm"), "products[0].template is 'gemm'; allowed: linear_cross_entropy_exponentials, "),
        (changed(hooks=["stored"]), "hooks has 'stored'; allowed for linear_cross_entropy_sum: rows inside"),
        (changed(dtype="float16"), "products[0].dtype is 'float16'; allowed: 'bfloat16'"),
        (changed(n=1000), "products[0].n is 1000; allowed: a power of two; 1024 stands for sizes like this one"),
        ({"products": [GOOD, GOOD]}, "products[1] is for the same products as products[0]; remove one"),
    ],
)
def test_what_is_wrong_in_a_table_is_said(content: Any, message: str) -> None:
    if isinstance(content, dict) and "template" in content:
        content = {"products": [content]}
    user_path().write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        tiles_for(product())
    assert str(caught.value).startswith(f"{user_path()}: ")
    assert str(caught.value).endswith("mend it, or remove it and tune again")


def test_everything_wrong_is_said_at_once() -> None:
    user_path().write_text(json.dumps({"products": [changed(tiles={"m": 100}), changed(layout="xy")]}))
    with pytest.raises(ConfigError) as caught:
        read_user_table()
    assert len(str(caught.value).splitlines()) == 3


def test_a_table_that_cannot_be_read_or_kept_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_path().mkdir()
    with pytest.raises(ConfigError, match=r"tiles.json cannot be read: .*remove it and tune again"):
        read_user_table()
    (cache / "file").write_text("")
    monkeypatch.setenv("STRUCTFLY_CACHE_DIR", str(cache / "file"))
    with pytest.raises(StructflyError, match=r"tuned tiles cannot be kept in .*; set STRUCTFLY_CACHE_DIR"):
        write_user_table(Table())


def test_a_table_is_written_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_user_table(Table().with_choices([(product(), SAFE)]))
    before = user_path().read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StructflyError, match="No space left on device"):
        write_user_table(Table())
    assert user_path().read_text() == before
    assert [file.name for file in cache.iterdir() if file.suffix != ".tmp"] == ["tiles.json"]


def test_a_head_whose_table_is_wrong_stays_and_the_report_says_why() -> None:
    user_path().write_text("{")
    site = choose((16384, 2048, 131072))
    assert site.status != "rewritten"
    assert "not valid JSON" in site.reason


@given(size=st.integers(1, 2**20))
def test_size_classes_are_powers_of_two(size: int) -> None:
    assert size <= size_class(size) < 2 * size
    assert size_class(size_class(size)) == size_class(size)


def test_the_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Table] = []

    def counted() -> Table:
        reads.append(read_user_table())
        return reads[-1]

    monkeypatch.setattr(choice, "read_user_table", counted)
    for n in (1024, 2048, 4096):
        tiles_for(product(n=n))
    assert len(reads) == 1
