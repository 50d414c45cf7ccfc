"""params.yaml: every validator refuses what it is for, all faults come together, and nothing is lost in a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mind.config import Config, flatten, merge
from mind.errors import ConfigError
from mind.params import dump_raw, load_config, nest, parse_overrides, validate

ROOT = Path(__file__).parent.parent


def test_the_shipped_params_are_valid_and_survive_a_round_trip() -> None:
    config = load_config(ROOT / "params.yaml")
    assert validate(YAML(typ="safe").load(dump_raw(config.model_dump(mode="json")))) == config


def test_empty_params_mean_the_defaults() -> None:
    assert validate({}) == Config()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"trianing": {}}, "trianing: unknown key; did you mean 'training'?"),
        ({"training": {"epoch": 1}}, "training.epoch: unknown key; did you mean 'epochs'?"),
        ({"student": {"lora": {"rank": 8, "rr": 8}}}, "student.lora.rr: unknown key; did you mean 'r'?"),
        ({"training": {"epochs": 0}}, "training.epochs: Input should be greater than 0 (found 0)"),
        ({"variants": {"base": {"method": "base"}, "x": {"method": "mnd"}}}, "variants.x.method: unknown method 'mnd'"),
        ({"variants": {"base": {"method": "base"}, "x": {}}}, "variants.x.method: missing"),
        (
            {"variants": {"base": {"method": "base"}, "x": {"method": "mind", "inertai": 0}}},
            "variants.x.inertai: unknown key; did you mean 'inertia'?",
        ),
        (
            {"variants": {"base": {"method": "base"}, "x": {"method": "base", "training": {"epoch": 2}}}},
            "variants.x.training.epoch: unknown key",
        ),
        ({"variants": {"base": {"method": "base"}, "../x": {"method": "base"}}}, "variants.../x"),
        ({"variants": {"base": {"method": "base"}, "x": {"method": "single", "perspective": "magic"}}}, "variants.x.perspective"),
        ({"run": {"variants": ["base", "mnid"]}}, "variant 'mnid' is not defined; did you mean 'mind'?"),
        ({"run": {"reference": "nobody"}}, "variant 'nobody' is not defined"),
        ({"synthesis": {"perspectives": ["socratic", "magic"]}}, "unknown perspective 'magic'"),
        ({"synthesis": {"perspectives": ["socratic", "socratic"]}}, "stands twice"),
        ({"synthesis": {"perspectives": []}}, "at least one perspective"),
    ],
)
def test_a_fault_is_named_with_its_place(raw: dict, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(raw)
    assert says in str(caught.value)


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"training": {"epoch": 1, "learning_rate": -1}, "stduent": {}})
    assert "3 settings" in str(caught.value)


def test_a_variant_lays_its_own_settings_on_the_common_ones() -> None:
    config = validate(
        {
            "seed": 3,
            "student": {"lora": {"r": 4, "alpha": 9}},
            "variants": {
                "base": {"method": "base"},
                "mind": {"method": "mind", "beta": 0.5, "seed": 8, "student": {"lora": {"r": 2}}, "training": {"epochs": 7}},
            },
        }
    )
    own = config.variant("mind")
    assert (own.seed, own.method.beta, own.training.epochs) == (8, 0.5, 7)  # type: ignore[union-attr]
    assert (own.student.lora.r, own.student.lora.alpha) == (2, 9)
    assert config.variant("base").seed == 3
    with pytest.raises(ConfigError, match="unknown variant 'other'"):
        config.variant("other")


def test_overrides_are_yaml_values_by_path() -> None:
    assert parse_overrides(["training.learning_rate=3e-4", "run.variants=[base, mind]", "teacher.top_p="]) == {
        "training": {"learning_rate": 3e-4},
        "run": {"variants": ["base", "mind"]},
        "teacher": {"top_p": None},
    }
    with pytest.raises(ConfigError, match="--set training.epochs"):
        parse_overrides(["training.epochs"])
    with pytest.raises(ConfigError, match="wanted: stage.key"):
        nest({"training..epochs": 1})


@pytest.mark.parametrize(
    "item",
    ["run.variants=[base", "teacher.model=@x", "teacher.model='gpt", "run.reference=a: b: c", "seed=2026-02-30", "teacher.model=\x07"],
)
def test_an_override_that_is_no_yaml_is_quoted_with_how_to_write_it(item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([item])
    assert f"--set '{item}'" in str(caught.value)
    assert "bracket" in str(caught.value) and "quotes" in str(caught.value)


def test_flatten_is_the_inverse_of_nest() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}
    assert nest(flatten(nested)) == nested


def test_merge_changes_neither_side() -> None:
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(base, over) == {"a": {"b": 3, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}} and over == {"a": {"b": 3}}


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    broken = tmp_path / "params.yaml"
    broken.write_text("seed: 1\nrun: [\n")
    with pytest.raises(ConfigError, match=r"params.yaml, line \d"):
        load_config(broken)
    broken.write_text("seed: 1\nstarted: 2026-02-30\n")
    with pytest.raises(ConfigError, match="params.yaml: day is out of range"):
        load_config(broken)
    broken.write_text("seed: \x07")
    with pytest.raises(ConfigError, match="params.yaml: unacceptable character"):
        load_config(broken)
    broken.write_bytes("seed: 1  # für alle".encode("latin-1"))
    with pytest.raises(ConfigError, match="params.yaml: 'utf-8' codec"):
        load_config(broken)
    broken.write_text("just text")
    with pytest.raises(ConfigError, match="holds str"):
        load_config(broken)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")
