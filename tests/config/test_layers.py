"""Which value holds: that in options over the file's, that of later overrides over earlier ones."""

from pathlib import Path

import pytest

from structfly.config import Config, load_config
from structfly.errors import ConfigError

RULES = ("linear_cross_entropy", "low_rank")
STRUCTURES = ("low_rank", "monarch")

FILE = """
rewrite = "always"
strict = true
mode = "max-autotune"
[budget]
loss_memory = "1KiB"
[rules]
linear_cross_entropy = false
low_rank = false
[inductor]
size_asserts = false
[inductor.triton]
cudagraphs = false
[overrides.head]
loss_memory = 7
[overrides."he*"]
rewrite = "auto"
loss_memory = 8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "structfly.toml"
    path.write_text(FILE)
    return path


def load(file: Path, **options: object) -> Config:
    return load_config({"config": file, **options}, known_rules=RULES, known_structures=STRUCTURES)


def test_what_options_leave_out_stays_as_in_the_file(file: Path) -> None:
    plain = load(file)
    assert plain.rewrite == "always"
    assert plain == load(file, budget={}, rules={}, inductor={}, overrides={})


@pytest.mark.parametrize(
    "options",
    [
        {"rewrite": "auto"},
        {"strict": False},
        {"mode": "default"},
        {"mode": None},
        {"budget": {"loss_memory": None}},
        {"rules": {"low_rank": True}},
    ],
)
def test_options_win(file: Path, options: dict[str, object]) -> None:
    (name, value), below = *options.items(), load(file).model_dump()
    if isinstance(value, dict):
        value = below[name] | value
    assert load(file, **options).model_dump() == below | {name: value}
    assert value != below[name]


@pytest.mark.parametrize("inductor", [{"triton.cudagraphs": True}, {"triton": {"cudagraphs": True}}])
def test_inductor_options_win_however_they_are_written(file: Path, inductor: dict[str, object]) -> None:
    assert load(file, inductor=inductor).inductor == {"size_asserts": False, "triton.cudagraphs": True}


def test_the_mode_may_be_given_to_torch_compile_while_the_file_has_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("strict = true")
    config = load_config({"config": file}, "reduce-overhead")
    assert (config.strict, config.mode) == (True, "reduce-overhead")


def test_the_table_of_a_shared_file(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text("[project]\nname = 'a'\n[tool.other]\nstrict = false\n[tool.structfly]\nstrict = true")
    assert load_config({"config": file}) == load_config({"strict": True})


def test_a_path_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text("strict = true")
    monkeypatch.chdir(tmp_path)
    assert load_config({"config": "a.toml"}).strict


def test_the_options_given_are_not_changed(file: Path) -> None:
    options: dict[str, object] = {"config": file, "strict": False}
    load_config(options, known_rules=RULES, known_structures=STRUCTURES)
    assert options == {"config": file, "strict": False}


# ---------------------------------------------------------------------------------- overrides


def test_the_last_pattern_that_matches_wins_per_key(file: Path) -> None:
    config = load(file)
    assert config.for_site("head") == config.for_site("heap")
    head, other = config.for_site("head"), config.for_site("tail")
    assert (head.loss_memory, head.rewrite) == (8, "auto")
    assert (other.loss_memory, other.rewrite) == (1024, "always")


def test_overrides_in_options_come_after_all_of_the_files(file: Path) -> None:
    """``head`` stands first in the file; the options' table for it still beats the file's later pattern."""
    config = load(file, overrides={"head": {"loss_memory": 9}})
    head, heap = config.for_site("head"), config.for_site("heap")
    assert (head.loss_memory, head.rewrite) == (9, "auto")
    assert (heap.loss_memory, heap.rewrite) == (8, "auto")


def test_an_override_may_go_back_to_the_default(file: Path) -> None:
    config = load(file, overrides={"head": {"loss_memory": None}})
    assert config.for_site("head").loss_memory is None


def test_rules_are_switched_one_by_one(file: Path) -> None:
    overrides = {"*": {"rules": {"low_rank": True}}, "a": {"rules": {"linear_cross_entropy": True}}}
    config = load(file, overrides=overrides)
    enabled = {name: [config.for_site(name).rule_enabled(rule) for rule in RULES] for name in ("a", "b")}
    assert enabled == {"a": [True, True], "b": [False, True]}
    assert load_config(None).for_site("a").rule_enabled("low_rank")


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("*.lm_head", "model.lm_head", True),
        ("layers.*", "layers.3.mlp.up", True),
        ("layers.?", "layers.13", False),
        ("layers.[02].mlp", "layers.2.mlp", True),
        ("layers.[!02].mlp", "layers.2.mlp", False),
        ("LM_head", "lm_head", False),
        ("*", "", True),
        ("?*", "", False),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    config = load_config({"overrides": {pattern: {"rewrite": "always"}}})
    assert (config.for_site(name).rewrite == "always") is matches


# ---------------------------------------------------------------------------------- layers


def test_structures_are_replaced_where_an_override_says_so(file: Path) -> None:
    config = load(file, structures=["low_rank"], overrides={"head": {"structures": []}, "tail": {"rewrite": "auto"}})
    head, tail = config.for_site("head"), config.for_site("tail")
    assert (head.structures, tail.structures) == ((), ("low_rank",))
    assert ("structures" in head.overridden, "structures" in tail.overridden) == (True, False)


def test_layers_are_restructured_only_under_a_budget_of_theirs_or_a_plan(file: Path) -> None:
    assert not load(file).restructures
    assert not load(file, structures=["low_rank"]).restructures
    assert not load(file, budget={"params": None}).restructures
    assert load(file, budget={"params": 0.5}).restructures
    assert load(file, budget={"loss": 0}).restructures
    assert load(file, plan="plan.json").restructures


def test_a_plan_in_options_meets_a_budget_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[budget]\nparams = 0.5")
    with pytest.raises(ConfigError, match="plan is given together with budget"):
        load(file, plan="plan.json")
    assert load(file, plan="plan.json", budget={"params": None}).budget.params is None
