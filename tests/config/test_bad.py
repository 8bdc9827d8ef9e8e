"""Configurations that are refused, and what the message says."""

import math
from pathlib import Path
from typing import Any

import pytest

from structfly.config import load_config
from structfly.errors import ConfigError

RULES = ("linear_cross_entropy", "low_rank")
STRUCTURES = ("low_rank", "monarch")
TOP = "allowed: budget, config, inductor, mode, overrides, plan, rewrite, rules, strict, structures, timing_seconds"
BUDGET = "allowed: activation_bytes, flops, loss, loss_memory, params, time, weight_bytes"
OVERRIDE = "allowed: loss_memory, rewrite, rules, structures"
SIZES = (
    "allowed: a whole number of bytes above 0, a string such as '512MiB' or '1.5 GB' "
    "(units B, KB, MB, GB, KiB, MiB, GiB), or None"
)
MODES = "allowed: default, lite, max-autotune, max-autotune-no-cudagraphs, reduce-overhead"
OPTION_NAMES = "allowed: the names that torch._inductor.list_options() gives"


@pytest.fixture(autouse=True)
def known_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages list the modes, which differ between releases of torch."""
    modes = ["default", "lite", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"]
    monkeypatch.setattr("structfly.compat.inductor_modes", lambda: {mode: {} for mode in modes})


def message(options: Any, mode: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(options, mode, known_rules=RULES, known_structures=STRUCTURES)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # tables
        ({"budget": 3}, "budget is 3; allowed: a table"),
        ({"budget": None}, "budget is None; allowed: a table"),
        ({"rules": ["low_rank"]}, "rules is ['low_rank']; allowed: a table"),
        ({"inductor": [1]}, "inductor is [1]; allowed: a table"),
        ({"overrides": "lm_head"}, "overrides is 'lm_head'; allowed: a table"),
        ({"overrides": {"a": True}}, "overrides.a is True; allowed: a table"),
        # keys
        ({3: 1}, "the table has the key 3; allowed: strings as keys"),
        ({"budget": {3: 1}}, "budget has the key 3; allowed: strings as keys"),
        ({"rules": {3: True}}, "rules has the key 3; allowed: strings as keys"),
        ({"inductor": {3: 1}}, "inductor has the key 3; allowed: strings as keys"),
        ({"overrides": {3: {}}}, "overrides has the key 3; allowed: strings as keys"),
        ({"overrides": {"a.*": {3: 1}}}, 'overrides."a.*" has the key 3; allowed: strings as keys'),
        # types of Inductor's options
        (
            {"inductor": {"max_autotune": "yes"}},
            "inductor is {'max_autotune': 'yes'}; allowed: for max_autotune a value of type bool",
        ),
        (
            {"inductor": {"triton": {"cudagraphs": None}}},
            "inductor is {'triton': {'cudagraphs': None}}; allowed: for triton.cudagraphs a value of type bool",
        ),
        # unknown names
        ({"stict": True}, f"stict is unknown; {TOP}; did you mean strict?"),
        ({"xyz": True}, f"xyz is unknown; {TOP}"),
        (
            {"max-autotune": True},
            f"max-autotune is unknown; {TOP}; Inductor's options go into the table inductor",
        ),
        ({"budget": {"speed": 0.5}}, f"budget.speed is unknown; {BUDGET}"),
        (
            {"budget": {"max_autotune": True}},
            f"budget.max_autotune is unknown; {BUDGET}; Inductor's options go into the table inductor",
        ),
        (
            {"overrides": {"a": {"strict": True}}},
            f"overrides.a.strict is unknown; {OVERRIDE}; did you mean structures?",
        ),
        (
            {"overrides": {"[key]": {"[key]": 1}}},
            f'overrides."[key]"."[key]" is unknown; {OVERRIDE}',
        ),
        (
            {"rules": {"low_rang": False}},
            "rules.low_rang is unknown; allowed: linear_cross_entropy, low_rank; did you mean low_rank?",
        ),
        (
            {"overrides": {"a": {"rules": {"x": False}}}},
            "overrides.a.rules.x is unknown; allowed: linear_cross_entropy, low_rank",
        ),
        (
            {"inductor": {"max-autotun": True}},
            f"inductor.max_autotun is unknown; {OPTION_NAMES}; did you mean max_autotune?",
        ),
        (
            {"inductor": {"triton": {"cudagraph": True}}},
            f'inductor."triton.cudagraph" is unknown; {OPTION_NAMES}; did you mean triton.cudagraphs?',
        ),
        ({"inductor": {"qqq": {"www": True}}}, f"inductor.qqq is unknown; {OPTION_NAMES}"),
        # values
        ({"budget": {"loss_memory": 0}}, f"budget.loss_memory is 0; {SIZES}"),
        ({"budget": {"loss_memory": -1}}, f"budget.loss_memory is -1; {SIZES}"),
        ({"budget": {"loss_memory": True}}, f"budget.loss_memory is True; {SIZES}"),
        ({"budget": {"loss_memory": 1e9}}, f"budget.loss_memory is 1000000000.0; {SIZES}"),
        ({"overrides": {"a": {"loss_memory": "1"}}}, f"overrides.a.loss_memory is '1'; {SIZES}"),
        ({"rewrite": "allways"}, "rewrite is 'allways'; allowed: 'auto' or 'always'"),
        ({"rewrite": None}, "rewrite is None; allowed: 'auto' or 'always'"),
        ({"rewrite": ["auto"]}, "rewrite is ['auto']; allowed: 'auto' or 'always'"),
        ({"overrides": {"a": {"rewrite": None}}}, "overrides.a.rewrite is None; allowed: 'auto' or 'always'"),
        ({"strict": 1}, "strict is 1; allowed: true or false"),
        ({"strict": "yes"}, "strict is 'yes'; allowed: true or false"),
        ({"rules": {"low_rank": "off"}}, "rules.low_rank is 'off'; allowed: true or false"),
        ({"mode": "max-autotone"}, f"mode is 'max-autotone'; {MODES}; did you mean max-autotune?"),
        ({"mode": ["default"]}, f"mode is ['default']; {MODES}; did you mean default?"),
        (
            {"inductor": {"max_autotune": True, "max-autotune": False}},
            "inductor is {'max-autotune': False, 'max_autotune': True}; "
            "allowed: each option once, but max_autotune is given twice",
        ),
        (
            {"inductor": {"triton.cudagraphs": 1, "triton": {"cudagraphs": 1}}},
            "inductor is {'triton': {'cudagraphs': 1}, 'triton.cudagraphs': 1}; "
            "allowed: each option once, but triton.cudagraphs is given twice",
        ),
        # layers
        (
            {"budget": {"params": "half"}},
            "budget.params is 'half'; allowed: a ratio of the dense layers' as a float above 0, such as 0.5, "
            "a whole number above 0, or None",
        ),
        ({"budget": {"loss": -1}}, "budget.loss is -1; allowed: a number of at least 0, or None"),
        ({"structures": ["monarc"]}, "structures is ['monarc']; allowed: low_rank, monarch; did you mean monarch?"),
        (
            {"structures": "monarch"},
            "structures is 'monarch'; allowed: a list of names of structures, of low_rank, monarch",
        ),
        ({"overrides": {"a": {"structures": [3]}}}, "overrides.a.structures is [3]; allowed: low_rank, monarch"),
        ({"timing_seconds": -1}, "timing_seconds is -1; allowed: a number of seconds of at least 0"),
        ({"timing_seconds": "2s"}, "timing_seconds is '2s'; allowed: a number of seconds of at least 0"),
        ({"timing_seconds": True}, "timing_seconds is True; allowed: a number of seconds of at least 0"),
        ({"timing_seconds": math.inf}, "timing_seconds is inf; allowed: a number of seconds of at least 0"),
        ({"plan": 3}, "plan is 3; allowed: the path of a saved plan, a structfly.Plan, or None"),
        ({"plan": ""}, "plan is ''; allowed: the path of a saved plan, a structfly.Plan, or None"),
        (
            {"plan": "a.json", "budget": {"params": 0.5, "loss": 1, "loss_memory": 3}},
            "plan is given together with budget.params, budget.loss; a plan stands instead of a budget of layers, "
            "leave one of them out",
        ),
        ({"config": 3}, "config is 3; allowed: the path of a TOML file"),
        ({"config": None}, "config is None; allowed: the path of a TOML file"),
        ({"config": b"a.toml"}, "config is b'a.toml'; allowed: the path of a TOML file"),
        ({"config": "\0"}, "config is '\\x00', which is no path: embedded null byte"),
    ],
)
def test_refused(options: object, expected: str) -> None:
    assert message(options) == f"options: {expected}"


@pytest.mark.parametrize(
    "size",
    ["", "512", "MiB", "0B", "0.0GiB", "0.5B", "-1B", "+1B", "1e3B", "1TB", "1IB", "12 parsecs", "1  MB",
     " 1MB", "1MB\n", "1_000B", ".5MB", "5.MB", "1,5MB", "\u0663MB", "1\u212aB", "9" * 5000 + "B"],
)  # fmt: skip
def test_strings_that_are_no_size(size: str) -> None:
    text = message({"budget": {"loss_memory": size}})
    assert text.startswith("options: budget.loss_memory is ")
    assert text.endswith(SIZES)
    assert len(text) < 300


@pytest.mark.parametrize("options", [[("strict", True)], "strict", 3])
def test_options_that_are_no_mapping(options: object) -> None:
    assert message(options) == f"options is {options!r}; allowed: a mapping from option names to values"


def test_without_known_rules_every_rule_name_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"^options: rules.low_rank is unknown; allowed: nothing$"):
        load_config({"rules": {"low_rank": False}})


@pytest.mark.parametrize("mode", ["fast", 3])
def test_the_mode_given_to_torch_compile_is_checked(mode: object) -> None:
    assert message(None, mode) == f"torch.compile: mode is {mode!r}; {MODES}"


def test_two_modes_must_agree(tmp_path: Path) -> None:
    expected = "torch.compile: mode is 'max-autotune', but the option mode is 'default'; give one"
    assert message({"mode": "default"}, "max-autotune") == expected
    file = tmp_path / "a.toml"
    file.write_text("mode = 'default'")
    assert message({"config": file}, "max-autotune") == expected


NO_TABLE = ": has [tool] but no table [tool.structfly], which is where the options are read"
NO_CONFIG = ": config is allowed in options only; a file cannot name another file"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("strict = 1", ": strict is 1; allowed: true or false"),
        ("stict = true", f": stict is unknown; {TOP.replace('config, ', '')}; did you mean strict?"),
        ("config = 'b.toml'", NO_CONFIG),
        (
            "[budget]\nloss_memory = 1979-05-27",
            f": budget.loss_memory is datetime.date(1979, 5, 27); {SIZES}",
        ),
        ("[tool.structfly]\nstrict = 1", " [tool.structfly]: strict is 1; allowed: true or false"),
        ("[tool.structfly]\nconfig = 1", f" [tool.structfly]{NO_CONFIG}"),
        (
            "strict = true\nrules = {}\n[tool.structfly]",
            ": rules, strict outside [tool.structfly]; move it into that table",
        ),
        ("[tool.ruff]", NO_TABLE),
        ("tool = 3", NO_TABLE),
        ("[tool]\nstructfly = 3", NO_TABLE),
    ],
)
def test_refused_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    assert message({"config": str(file)}) == f"{file}{expected}"


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(b"strict = \xff")
    assert message({"config": file}) == f"{file}: not UTF-8, as TOML must be: invalid start byte at byte 9"


def test_invalid_toml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("strict = true\nrewrite = always\n")
    text = message({"config": file})
    assert text.startswith(f"{file}: not valid TOML: ")
    assert "line 2" in text


@pytest.mark.parametrize(("name", "why"), [("none.toml", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, why: str) -> None:
    path = str(tmp_path / name)
    assert message({"config": path}) == f"options: config is {path!r}, which cannot be read: {why}"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("strict = 1\n[budget]\nloss_memory = 0\ntim = 1")
    assert message({"config": file, "strict": 2, "xyz": 1}, "fast").splitlines() == [
        f"{file}: budget.loss_memory is 0; {SIZES}",
        f"{file}: budget.tim is unknown; {BUDGET}; did you mean time?",
        f"{file}: strict is 1; allowed: true or false",
        "options: strict is 2; allowed: true or false",
        f"options: xyz is unknown; {TOP}",
        f"torch.compile: mode is 'fast'; {MODES}",
    ]
    lines = message({"config": str(tmp_path / "none"), "xyz": 1}).splitlines()
    assert lines[1:] == [f"options: xyz is unknown; {TOP}"]


def test_long_values_are_shortened() -> None:
    text = message({"rewrite": "x" * 10_000})
    assert "xxx...xxx" in text
    assert len(text) < 200
