"""Recipes to and from YAML; what is wrong with one is said in plain words, all at once, with file and line."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from linearize.layers.config import PRESETS
from linearize.recipes.fields import Section
from linearize.recipes.schema import Recipe

# Where each value stands: its path of keys and list indices -> line in the file, or 0 for the command line.
Lines = dict[tuple[str | int, ...], int]


class RecipeError(ValueError):
    """A recipe that cannot be used; `problems` holds one line for each thing to mend."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    # No field is a date, and `2024-13-45` is a name like any other.
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    # PyYAML follows YAML 1.1, where 1e-3 without a point is text.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Outside double quotes \x85 and the like are line breaks, which reading turns into spaces.
    style = '"' if text.splitlines() != [text] else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name -> YAML file."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe, without network, torch or transformers.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe.
        overrides: changes such as `transfer.steps=20` or `medusa=null`; the right side is YAML.

    Raises:
        RecipeError: with all problems, e.g.
            `recipe.yaml:4: attention.feature_dimm: unknown field, did you mean feature_dim?`
    """
    path = shipped_recipes().get(recipe, Path(recipe))
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        names = ", ".join(shipped_recipes())
        raise RecipeError([f"{recipe}: no such file, and no shipped recipe of that name ({names})"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot be read as a text file: {error}"]) from None

    lines: Lines = {(): 1}
    problems: list[tuple[int, str]] = []
    try:
        data = _parse(text, (), lines, problems)
        if not isinstance(data, dict):
            problems.append((1, f"expected sections such as model: and data:, got {_show(data)}"))
    except yaml.YAMLError as error:
        problems.append(_syntax(error, text))
        data = None
    if isinstance(data, dict):
        for override in overrides:
            _override(override, data, lines, problems)
        try:
            result = Recipe.model_validate(data)
        except ValidationError as error:
            problems += [_explain(item, lines) for item in error.errors()]
    if problems:
        problems.sort(key=lambda problem: problem[0] or float("inf"))
        raise RecipeError([(f"{path}:{line}: " if line else "command line: ") + what for line, what in problems])
    return result


def dump_recipe(recipe: Recipe, public: bool = False) -> str:
    """YAML of a recipe, defaults written out, that `load_recipe` reads as an equal recipe.

    Of the attention's fields only those that differ from the preset are written, so that the preset can still be
    changed from the command line.

    Args:
        public: others will read it, so what is on this machine is told by its name, without its place.
    """
    data = recipe.model_dump()
    if recipe.attention is not None:
        preset = PRESETS[recipe.attention.preset].to_dict()
        attention = recipe.attention.config.to_dict()
        data["attention"] = {
            "preset": recipe.attention.preset,
            **{name: value for name, value in attention.items() if value != preset[name]},
        }
    if public:
        data = without_places(data) | {"output": f"runs/{recipe.name}"}
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def without_places(value: Any, key: str = "") -> Any:
    """What stands in a recipe, or in a stage's metrics, with the names of what is on this machine alone."""
    if isinstance(value, dict):
        return {name: without_places(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, key) for item in value]
    is_place = key in ("source", "tokenizer", "deepspeed") and value and Path(value).expanduser().exists()
    return Path(value).name if is_place else value


def _parse(text: str, root: tuple, lines: Lines, problems: list[tuple[int, str]]) -> Any:
    """The data of a YAML text; notes the line of everything in it below `root`, and keys that stand there twice."""
    on_command_line = bool(root)

    def note(node: yaml.Node, path: tuple) -> None:
        if isinstance(node, yaml.MappingNode):
            seen = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                child = (*path, key.value if isinstance(key.value, str) else str(key.start_mark))
                if child in seen:
                    first = "" if on_command_line else f", first in line {seen[child]}"
                    problems.append((0 if on_command_line else line, f"{_dotted(child)}: stands here twice{first}"))
                seen[child] = line
                lines[child] = 0 if on_command_line else line
                note(value, child)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*path, index)] = 0 if on_command_line else value.start_mark.line + 1
                note(value, (*path, index))

    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        note(node, root)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _override(override: str, data: dict, lines: Lines, problems: list[tuple[int, str]]) -> None:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        problems.append((0, f"{override}: expected section.field=value"))
        return
    section = data
    for depth, name in enumerate(path[:-1], 1):
        if section.get(name) is None:
            section[name] = {}
            lines[path[:depth]] = 0
        section = section[name]
        if not isinstance(section, dict):
            problems.append((0, f"{key}: {_dotted(path[:depth])} is {_show(section)}, not a section with fields"))
            return
    for old in [old for old in lines if old[: len(path)] == path]:
        del lines[old]
    lines[path] = 0
    try:
        section[path[-1]] = _parse(text, path, lines, problems)
    except yaml.YAMLError as error:
        problems.append((0, f"{key}: {_syntax(error, text)[1]}"))


def _syntax(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return mark.line + 1, f"not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}"
    # Otherwise the reader met a character that YAML forbids.
    return text.count("\n", 0, error.position) + 1, f"not valid YAML: character U+{error.character:04X} is not allowed"


def _explain(error: dict, lines: Lines) -> tuple[int, str]:
    """Line and sentence of one pydantic error."""
    kind, context, given = error["type"], error.get("ctx", {}), _show(error["input"])
    loc = error["loc"]
    # An index that the file does not have comes from one data source written without its list.
    path = tuple(key for i, key in enumerate(loc) if isinstance(key, str) or loc[: i + 1] in lines)
    match kind:
        case "missing":
            message = "required, but missing"
        case "extra_forbidden":
            names = _field_names(path[:-1])
            close = difflib.get_close_matches(path[-1], names, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; the fields here are {', '.join(names)}"
            message = f"unknown field{hint}"
        case "invalid_key":
            path = path if path[-1:] == (given,) else (*path, given)
            message = "a field's name must be text"
        case "value_error":
            message = str(context["error"])
            field = message.partition(": ")[0]
            if field in _field_names(path):  # LinearAttentionConfig names the field itself
                path, message = (*path, field), message.removeprefix(f"{field}: ")
        case "int_type":
            message = f"expected a whole number, got {given}"
        case "float_type" | "finite_number":
            message = f"expected a number, got {given}"
        case "bool_type":
            message = f"expected true or false, got {given}"
        case "string_type" | "string_too_short":
            message = f"expected some text, got {given}"
        case "list_type":
            message = f"expected a list, got {given}"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = f"expected a section with fields, got {given}"
        case "too_short":
            message = "expected at least one entry, got an empty list"
        case "literal_error":
            message = f"expected {context['expected']}, got {given}"
        case "greater_than":
            message = f"expected more than {context['gt']:g}, got {given}"
        case "less_than":
            message = f"expected less than {context['lt']:g}, got {given}"
        case "greater_than_equal":
            message = f"expected {context['ge']:g} or more, got {given}"
        case "less_than_equal":
            message = f"expected {context['le']:g} or less, got {given}"
        case _:
            message = f"{error['msg'][0].lower()}{error['msg'][1:]}, got {given}"
    line = next(lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines)
    return line, f"{_dotted(path)}: {message}"


def _field_names(path: tuple) -> list[str]:
    """Fields of the section at a path; none where no section is."""
    section = Recipe
    for key in path:
        # The names in transfer.layers are the user's, each of one more section.
        if isinstance(key, str) and key in section.model_fields:
            annotation = section.model_fields[key].annotation
            candidates = (annotation, *get_args(annotation))
            section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
            if section is None:
                return []
    return list(section.model_fields)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _show(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return "a section with fields"
        case list():
            return "a list"
        case str():
            return repr(value)
        case _:
            return str(value)
