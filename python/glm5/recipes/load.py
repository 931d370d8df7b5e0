"""From a name or a file, and ``key.sub=value`` overrides, to a checked Recipe; and back to TOML for the run's folder."""

import difflib
import json
import sys
from pathlib import Path

from pydantic import BaseModel, ValidationError

from glm5.recipes.schema import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent


class RecipeError(ValueError):
    """The recipe cannot be used; the message names the file, the key, and what to write instead."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with glm5."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_recipe(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe `name`, one of ``recipe_names()`` or a path to a TOML file, with `overrides` applied.

    An override is ``dotted.key=value``; the value is read as TOML and, failing that, as a plain string.

    Raises:
        RecipeError: no such recipe, TOML that cannot be read, an unknown key, a value out of range, a malformed override.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = _FOLDER / f"{name}.toml"
        if not path.is_file():
            raise RecipeError(
                f"no recipe called {name!r}; there are {', '.join(recipe_names())}, or give a path to a .toml file"
            )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _apply(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"override {override!r}: want key=value, for example seed=1 or stages.pretrain.steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"override {override!r}: {parent} is a value, not a table")
    values[last] = value


def _explain(error: dict) -> str:
    """One pydantic error as a sentence with the dotted key and, for an unknown key, the nearest valid one."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if location[::2] == ["stages", "kind"] and error["input"] == location[1]:  # its name is the default of its kind
        return f"stages.{location[1]}: no such stage; a new one needs {key}: {error['msg']}"
    if error["type"] == "missing":
        return f"key {key} is missing"
    if error["type"] == "value_error":  # a check over several keys, which its message names
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: got {error['input']!r}: {error['msg']}"


def _known_keys(location: list[str]) -> list[str]:
    """The keys that the schema has at `location`."""
    schema: type[BaseModel] = Recipe
    for part in location:
        if part in schema.model_fields:
            annotation = schema.model_fields[part].annotation
            arguments = getattr(annotation, "__args__", ())
            schema = arguments[-1] if arguments else annotation
        if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            return []
    return list(schema.model_fields)


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every default written out; ``load_recipe`` reads it back to an equal recipe."""
    lines: list[str] = []
    _write_table(lines, [], recipe.model_dump())
    return "\n".join(lines).strip() + "\n"


def _write_table(lines: list[str], path: list[str], table: dict) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(lines, [*path, key], value)


def _toml_value(value) -> str:
    """JSON's numbers, booleans, lists and strings are also TOML's, but for surrogate pairs and a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
