"""docs/configuration.md: its examples run, and it describes every field."""

import re
from pathlib import Path

import pytest

from structfly.config import Budget, Config, Override, load_config
from structfly.patterns.structures import STRUCTURES

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TOML is loaded, under the name in its first line; Python shares one namespace, as on the page."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    languages = [language for language, _ in BLOCKS]
    assert set(languages) == {"toml", "python"}
    assert len(languages) * 2 == PAGE.count("```")
    for language, text in BLOCKS:
        if language == "toml":
            named = re.match(r"# (\S+\.toml)\n", text)
            path = Path(named[1] if named else "unnamed.toml")
            path.write_text(text, encoding="utf-8")
            load_config({"config": path}, known_rules=("linear_cross_entropy",), known_structures=STRUCTURES)
        else:
            exec(compile(text, "docs/configuration.md", "exec"), namespace)


@pytest.mark.parametrize(
    "option",
    [
        "config",
        *Config.model_fields,
        *(f"budget.{name}" for name in Budget.model_fields),
        *(f"overrides.*.{name}" for name in Override.model_fields),
    ],
)
def test_every_field_has_its_section(option: str) -> None:
    assert re.search(rf"^##+ `{re.escape(option)}`$", PAGE, re.MULTILINE)


def test_no_section_describes_a_field_that_is_gone() -> None:
    known = {"config", *Config.model_fields}
    assert {name.partition(".")[0] for name in re.findall(r"^##+ `(\S+)`$", PAGE, re.MULTILINE)} == known
