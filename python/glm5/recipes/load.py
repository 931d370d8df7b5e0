"""From a name or a file, and ``key.sub=value`` overrides, to a checked Recipe; and back to TOML for the run's folder.

Data recipes are read in the same way.
"""

import difflib
import json
import sys
from pathlib import Path

from pydantic import BaseModel, ValidationError

from glm5.recipes.data_schema import BuildRecipe
from glm5.recipes.schema import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent
_DATA_FOLDER = _FOLDER / "data"


class RecipeError(ValueError):
    """The recipe cannot be used; the message names the file, the key, and what to write instead."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with glm5."""
    return _names(_FOLDER)


def data_recipe_names() -> list[str]:
    """Names of the data recipes that come with glm5."""
    return _names(_DATA_FOLDER)


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_recipe(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe `name`, one of ``recipe_names()`` or a path to a TOML file, with `overrides` applied.

    An override is ``dotted.key=value``; the value is read as TOML and, failing that, as a plain string.

    Raises:
        RecipeError: no such recipe, TOML that cannot be read, an unknown key, a value out of range, a malformed override.
    """
    return _load(name, overrides, _FOLDER, "recipe", Recipe)


def load_data_recipe(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> BuildRecipe:
    """The data recipe `name`, one of ``data_recipe_names()`` or a path; as ``load_recipe``."""
    return _load(name, overrides, _DATA_FOLDER, "data recipe", BuildRecipe)


def _load(name: str | Path, overrides, folder: Path, kind: str, schema: type[BaseModel]):
    path = Path(name)
    if path.suffix != ".toml":
        path = folder / f"{name}.toml"
        if not path.is_file():
            raise RecipeError(
                f"no {kind} called {name!r}; there are {', '.join(_names(folder))}, or give a path to a .toml file"
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
        return schema.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(_explain(e, schema) for e in error.errors())) from None


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


def _explain(error: dict, schema: type[BaseModel]) -> str:
    """One pydantic error as a sentence with the dotted key and, for an unknown key, the nearest valid one."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location[:2] + location[3:] if location[0] == "sources" else location)  # without the kind
    if error["type"] == "extra_forbidden":
        known = _known_keys(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {key.removesuffix(location[-1])}{near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if location[::2] == ["stages", "kind"] and error["input"] == location[1]:  # its name is the default of its kind
        return f"stages.{location[1]}: no such stage; a new one needs {key}: {error['msg']}"
    if error["type"] == "missing":
        return f"key {key} is missing"
    if error["type"] == "value_error":  # a check over several keys, which its message names
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: got {error['input']!r}: {error['msg']}"


def _known_keys(schema: type[BaseModel], location: list[str]) -> list[str]:
    """The keys that the schema has at `location`, where pydantic also names the chosen kind of a source."""
    choices, parts = [schema], iter(location)
    for part in parts:
        if len(choices) > 1:
            choices = [choice for choice in choices if choice.model_fields["kind"].default == part]
        elif choices and part in choices[0].model_fields:
            annotation = choices[0].model_fields[part].annotation
            choices = _models(annotation)
            if getattr(annotation, "__origin__", None) is dict:
                next(parts, None)
    return list(choices[0].model_fields) if len(choices) == 1 else []


def _models(annotation) -> list[type[BaseModel]]:
    """The schemas that an annotation names, in whatever it wraps them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models(argument)]


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
