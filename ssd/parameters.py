"""Parameters of the entry points: their names, types and defaults stand in MLproject alone, presets over them."""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import yaml

from ssd.decoding import Decoding

LATEST = "latest"  # an input: the newest finished run of the upstream step
ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("sample control", "evaluate search")  # sections of a preset over those of their entry point
# An arm is no path, whatever folder has its name.
MAY_BE_PATHS = ("model", "problems", "samples", "grades", "decodings", "space", "verdict", "chosen_on")
MAY_BE_PATHS += ("arms", "source_root", "train_sources", "val_sources", "final_sources", "base", "control")
AT_LEAST = dict.fromkeys(("n", "num_steps", "num_texts", "train_size", "val_size", "quick_size"), 1)
AT_LEAST |= dict.fromkeys(("global_batch_size", "max_length", "save_steps"), 1) | {"final_size": 0, "lora_rank": 0}
AT_LEAST |= dict.fromkeys(("trials", "trainings"), 1)
AT_LEAST |= {"num_problems": 0, "budget": 0, "tokens_per_second": 0.0, "gpu_hour_price": 0.0}
POSITIVE = ("lr", "epochs", "delta")
SHARES = ("alpha", "power")


@functools.cache
def _project() -> dict:
    return yaml.safe_load((ROOT / "MLproject").read_text())


def defaults(entry_point: str) -> dict[str, Any]:
    """Parameters of `entry_point` with their defaults, typed as MLproject declares them."""
    declared = _project()["entry_points"][entry_point]["parameters"]
    return {name: _typed(spec["type"], spec["default"], name) for name, spec in declared.items()}


def parse(entry_point: str) -> dict[str, str]:
    """Parameters of `entry_point` from the command line, as text; what is not given is MLproject's."""
    parser = argparse.ArgumentParser(prog=f"python -m steps.{entry_point}", allow_abbrev=False)
    for name, spec in _project()["entry_points"][entry_point]["parameters"].items():
        parser.add_argument(f"--{name}", default=str(spec["default"]), help=f"{spec['type']}, default %(default)s")
    return vars(parser.parse_args())


def typed(entry_point: str, texts: dict[str, str]) -> argparse.Namespace:
    """`texts` as the types that MLproject declares; ValueError names the parameter and the value that is not."""
    declared = _project()["entry_points"][entry_point]["parameters"]
    return argparse.Namespace(**{name: _typed(declared[name]["type"], text, name) for name, text in texts.items()})


def _typed(kind: str, value: Any, name: str) -> Any:
    article = {"int": "a whole number", "float": "a finite number", "string": "a text"}[kind]
    try:
        typed = {"int": lambda text: int(str(text)), "float": float, "string": str}[kind](value)
        if value is None or (kind == "float" and not math.isfinite(typed)):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not {article}") from None
    if name in AT_LEAST and typed < AT_LEAST[name]:
        raise ValueError(f"{name}={typed!r} is not {'an integer' if kind == 'int' else 'a number'} >= {AT_LEAST[name]}")
    if (name in POSITIVE and typed <= 0) or (name in SHARES and not 0 < typed < 1):
        raise ValueError(f"{name}={typed!r} is not {'above 0' if name in POSITIVE else 'between 0 and 1'}")
    return typed


def as_text(value: Any) -> str:
    """`value` as the text of a parameter."""
    return repr(value) if isinstance(value, float) else str(value)


def preset_values(preset: str, entry_point: str) -> dict[str, Any]:
    """Parameters of `entry_point` with the preset's values over MLproject's."""
    return defaults(entry_point) | load_preset(preset).get(entry_point, {})


@functools.cache
def load_preset(name: str) -> dict[str, dict[str, Any]]:
    """Values by entry point of `presets/NAME.yaml`, or of the file NAME where it ends in .yaml, over MLproject's."""
    path = Path(name) if name.endswith(".yaml") else ROOT / "presets" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
        raise ValueError(f"preset {name!r} is unknown ({path} does not exist); the presets are {', '.join(known)}")
    return {
        step: {key: _typed(_kind(step, key, name), value, key) for key, value in values.items()}
        for step, values in _mapping_of(path, dict).items()
    }


def load_decodings(path: str, max_tokens: int) -> dict[str, list[Decoding]]:
    """Candidate decodings by family, of a YAML file of lists of mappings such as `{temperature: 0.7, top_k: 20}`."""
    if not Path(path).is_file():
        raise ValueError(f"decodings={path}: no such file; give a YAML file of lists of decodings by family, or none")
    names = defaults("evaluate")
    try:
        families = _mapping_of(Path(path), list)
        for settings in (settings for of in families.values() for settings in of):
            if unknown := set(settings) - set(names):
                raise TypeError(f"{min(unknown)!r} is no parameter of evaluate")
        return {f: [Decoding(max_tokens=max_tokens, **settings) for settings in of] for f, of in families.items()}
    except TypeError as error:
        raise ValueError(f"decodings={path}: {error}; each entry is a mapping such as {{temperature: 0.7}}") from error


class _Loader(yaml.SafeLoader):
    """Plain values without aliases, a kilobyte of which may stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias; write what it stands for")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Content of the YAML file `path`; ValueError names the file where it is none."""
    try:
        return yaml.load(path.read_text(), _Loader)
    except RecursionError as error:
        raise ValueError(f"{path} is not YAML that can be read: it is nested too deeply; make it flat") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML of plain values ({' '.join(str(error).split())}); correct it") from error


def _mapping_of(path: Path, kind: type) -> dict[str, Any]:
    content = read_yaml(path)
    expected = "parameters by entry point" if kind is dict else "lists of decodings by family"
    if not isinstance(content, dict) or not all(isinstance(value, kind) and value for value in content.values()):
        raise ValueError(f"{path} does not hold {expected}")
    return content


def _kind(section: str, parameter: str, preset: str) -> str:
    entry_points = _project()["entry_points"]
    if section not in (*entry_points, *VARIANTS):
        raise ValueError(f"preset {preset}: {section!r} is none of {', '.join((*entry_points, *VARIANTS))}")
    declared = entry_points[section.split()[0]]["parameters"]
    if parameter not in declared:
        raise ValueError(f"preset {preset}: {section} has no parameter {parameter!r}; it has {', '.join(declared)}")
    return declared[parameter]["type"]
