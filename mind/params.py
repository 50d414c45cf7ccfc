"""params.yaml and `--set` <-> the models of mind/config.py.

Unknown keys are refused with their path and the nearest known key; all faults are reported together.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from mind.config import METHOD_NAMES, METHODS, Config, Student, Training, Variant, merge
from mind.errors import ConfigError, nearest


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """`['training.epochs=2', ...]` -> nested settings; values are YAML.

    Raises:
        ConfigError: an item without '=' or with an empty key, or a value that is no YAML.
    """
    flat: dict[str, Any] = {}
    for item in items:
        path, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}", wanted="--set stage.key=value, for instance --set training.epochs=2")
        try:
            flat[path.strip()] = YAML(typ="safe").load(text) if text else None
        except (YAMLError, ValueError) as error:
            raise ConfigError(
                f"--set '{item}': {_problem(error)}",
                wanted="a value as in params.yaml, for instance --set training.epochs=2",
                do="close brackets and quotes, and put a text with special characters in quotes of its own: "
                "--set 'run.variants=[base, mind]', --set 'teacher.model=\"a: b\"'",
            ) from None
    return nest(flat)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{'training.epochs': 2}` -> `{'training': {'epochs': 2}}`; values may be groups themselves.

    Raises:
        ConfigError: an empty key.
    """
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        keys = path.split(".")
        if not all(keys):
            raise ConfigError(f"setting '{path}'", wanted="stage.key, for instance training.epochs")
        for key in reversed(keys):
            value = {key: value}
        nested = merge(nested, value)
    return nested


def read_params(path: Path) -> dict[str, Any]:
    """The raw mapping of a params.yaml (YAML 1.2, so that 3e-4 is a number).

    Raises:
        ConfigError: missing, unreadable or malformed file.
    """
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", do="run `mind init DIR` to make a workspace") from None
    except (YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that no calendar has
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: {_problem(error)}", wanted="valid YAML in UTF-8") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}", wanted="groups of settings: run, teacher, training, ...")
    return raw


def _problem(error: Exception) -> str:
    """What the YAML reader stumbled over, on one line."""
    own = error.problem or error.context if isinstance(error, MarkedYAMLError) else None
    return (own or str(error) or type(error).__name__).splitlines()[0]


def validate(raw: Mapping[str, Any], source: str = "params.yaml") -> Config:
    """Raw settings -> Config.

    Raises:
        ConfigError: with every fault, its path and, for an unknown key, the nearest known one.
    """
    raw = {**raw, "variants": _nest_methods(raw.get("variants", {"base": {"method": "base"}, "mind": {"method": "mind"}}))}
    faults: list[str] = []
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise _fault(source, [_describe(e) for e in error.errors()]) from None
    for name, variant in config.variants.items():
        for group, model in (("student", Student), ("training", Training)):
            common = getattr(config, group).model_dump()
            try:
                model.model_validate(merge(common, getattr(variant, group)))
            except ValidationError as error:
                faults += [_describe({**e, "loc": ("variants", name, group, *e["loc"])}) for e in error.errors()]
        faults += _repeat_faults(name, config)
    for name in dict.fromkeys((*config.run.variants, config.run.reference)):
        if name not in config.variants:
            faults.append(f"run: variant '{name}' is not defined{nearest(name, config.variants)}; defined: {', '.join(config.variants)}")
    if faults:
        raise _fault(source, faults)
    return config


def _repeat_faults(name: str, config: Config) -> Iterable[str]:
    """What is wrong with a variant's claim to be another seed of another."""
    own, origin = config.variants[name], config.variants[name].repeats
    place = f"variants.{name}.repeats"
    if origin is None:
        return
    if origin not in config.variants or origin == name:
        yield f"{place}: '{origin}' is not another variant{nearest(origin, config.variants)}"
        return
    first = config.variants[origin]
    if first.repeats is not None:
        yield f"{place}: '{origin}' repeats '{first.repeats}' itself; wanted that one"
    differing = [group for group in ("method", "student", "training") if getattr(own, group) != getattr(first, group)]
    if differing:
        yield f"{place}: differs from '{origin}' in {', '.join(differing)}; wanted another seed only"
    seeds = {other: config.variant(other).seed for other, v in config.variants.items() if other == origin or v.repeats == origin}
    same = [other for other in seeds if other != name and seeds[other] == seeds[name]]
    if same:
        yield f"{place}: '{same[0]}' has the seed {seeds[name]} too; wanted another"


def over_seeds(config: Config, names: Iterable[str], seeds: Iterable[int]) -> dict[str, Any]:
    """The settings, to lay on those of `config`, under which `run.variants` is each of `names`, and the reference, with each of `seeds`.

    A variant keeps its name for the seed it has; with another it is NAME-SEED, so that a later call with more seeds names none anew.
    The untrained student has no seed and stands once. All variants of one seed come before those of the next.

    Raises:
        ConfigError: an unknown variant, one that is a repetition itself, or a name that is taken.
    """
    made: dict[str, Any] = {}
    order: dict[str, None] = {}
    for seed in seeds:
        for name in dict.fromkeys((config.run.reference, *names)):
            own = config.variant(name)
            if own.repeats is not None:
                raise ConfigError(f"'{name}' is another seed of '{own.repeats}'", do=f"name '{own.repeats}' and the seed {own.seed}")
            if own.method.method == "base" or own.seed == seed:
                order[name] = None
                continue
            repeat, variant = f"{name}-{seed}", config.variants[name].model_copy(update={"seed": seed, "repeats": name})
            if config.variants.get(repeat, variant) != variant:
                raise ConfigError(f"variant '{repeat}' is defined, and not as '{name}' with the seed {seed}", do="rename it")
            order[repeat] = None
            made[repeat] = _flatten_method(variant.model_dump(mode="json", exclude_unset=True))
    return {"run": {"variants": list(order)}, "variants": made}


def load_config(path: Path) -> Config:
    """Read and validate a params.yaml. Raises ConfigError."""
    return validate(read_params(path), str(path))


def dump_raw(data: Mapping[str, Any]) -> str:
    """A mapping of settings as YAML text."""
    out = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(dict(data), out)
    return out.getvalue()


def dump(config: Config) -> str:
    """All settings, defaults included, as params.yaml would have them."""
    data = config.model_dump(mode="json")
    return dump_raw({**data, "variants": {name: _flatten_method(own) for name, own in data["variants"].items()}})


def _nest_methods(variants: Any) -> Any:
    """A variant is written flat ({method: mind, inertia: 0}); its method's options move under `method` here."""
    if not isinstance(variants, Mapping):
        return variants
    own = set(Variant.model_fields) - {"method"}
    nested = {}
    for name, raw in variants.items():
        if isinstance(raw, Mapping) and not isinstance(raw.get("method"), Mapping):
            options = {k: v for k, v in raw.items() if k not in own}
            raw = {"method": options, **{k: v for k, v in raw.items() if k in own}}
        nested[name] = raw
    return nested


def _flatten_method(variant: Mapping[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in variant.items() if k != "method" and v not in ({}, None)}
    return {**variant["method"], **rest}


def _fault(source: str, faults: list[str]) -> ConfigError:
    return ConfigError(
        f"{source}: {len(faults)} setting{'s' if len(faults) > 1 else ''} cannot be used:\n    " + "\n    ".join(faults),
        do=f"mend {source} or the --set",
    )


def _describe(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    if loc[:1] == ["variants"] and loc[2:3] == ["method"]:  # variants.mind.method.mind.inertia -> variants.mind.inertia
        loc = [*loc[:2], *(loc[4:] if len(loc) > 4 else ["method"])]
    path = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{nearest(loc[-1], _known_keys(loc[:-1], error))}"
    if error["type"] == "union_tag_invalid":
        return f"{path}: unknown method {error['input'].get('method')!r}; wanted one of {', '.join(METHOD_NAMES)}"
    if error["type"] == "union_tag_not_found":
        return f"{path}: missing; wanted one of {', '.join(METHOD_NAMES)}"
    if error["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: {error['msg'].removeprefix('Value error, ')} (found {error['input']!r})"


def _known_keys(parents: list[str], error: Any) -> Iterable[str]:
    """The keys of the group that `parents` leads to."""
    model: Any = Config
    raw = list(error["loc"])
    if parents[:1] == ["variants"] and len(parents) >= 2:
        if "method" in raw:
            tag = raw[raw.index("method") + 1]
            model = next(m for m in METHODS if m.model_fields["method"].default == tag)
            known = set(model.model_fields) | set(Variant.model_fields)
            if len(parents) == 2:
                return known
        else:
            model = Variant
        parents = parents[2:]
        if parents[:1] == ["student"]:
            model, parents = Student, parents[1:]
        elif parents[:1] == ["training"]:
            model, parents = Training, parents[1:]
    for parent in parents:
        field = model.model_fields.get(parent)
        annotation = getattr(field, "annotation", None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    return model.model_fields
