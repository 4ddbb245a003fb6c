"""The chart's values.schema.json and README.md, generated from its commented values: `make chart`.

In values.yaml the comment lines right above a value are its description. Among them, `@schema {...}` (YAML on one line)
adds JSON Schema keywords to what the default tells by itself, and `@settings` stands for a map of the server's own
settings, whose schema comes from the Settings model. A default that does not tell its type (null, an empty list or map)
must come with a `@schema`, so that nothing is left open by accident. Maps take no other keys than those that are there.
"""

import enum
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from authz_server.settings import Settings

CHART = Path(__file__).parents[2] / "helm" / "authz-server"
SETTINGS_OF_THE_CHART = frozenset(
    {
        *("listen", "admin_listen", "tls_certificate", "tls_key", "tls_client_ca"),
        *("redis_url", "redis_username", "redis_password", "redis_password_file", "redis_prefix"),
        *("drain_seconds", "grace_seconds", "snapshot_file", "replica_name"),
        *("redis_sentinels", "redis_sentinel_primary", "redis_sentinel_username", "redis_sentinel_password"),
        *("redis_sentinel_password_file", "redis_cluster", "redis_database", "redis_tls", "redis_tls_ca"),
        *("redis_tls_certificate", "redis_tls_key"),
    }
)
"""The settings of the server that values of their own make: `listenAddress`, `ports`, `tls`, `redis`, `drain`,
`snapshotFile`, and the
pod's name."""

BEGIN = "<!-- values:begin (made by `make chart`) -->\n"
END = "<!-- values:end -->\n"

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Value:
    """One value with a comment of its own."""

    path: tuple[str, ...]
    default: Any
    description: str
    schema: Schema
    leaf: bool


class ChartValues:
    """values.yaml, read with its comments."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        assert isinstance(node, yaml.MappingNode)
        self.values: list[Value] = []
        properties = self._properties(node, yaml.safe_load(text), ())
        # Charts that hold this one as a part hand it their global values.
        properties["global"] = {"type": "object", "description": "Values shared with other charts; none is read here."}
        self.schema: Schema = {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "Values of the chart authz-server",
            "type": "object",
            "additionalProperties": False,
            "properties": properties,
        }

    def _properties(self, node: yaml.MappingNode, defaults: dict[str, Any], above: tuple[str, ...]) -> Schema:
        properties = {}
        for key_node, value_node in node.value:
            key = key_node.value
            path = (*above, key)
            description, extra = self._comment(key_node.start_mark.line, path)
            if isinstance(value_node, yaml.MappingNode) and value_node.value and "additionalProperties" not in extra:
                self.values.append(Value(path, None, description, {}, leaf=False))
                schema: Schema = {"type": "object", "additionalProperties": False}
                schema["properties"] = self._properties(value_node, defaults[key], path)
            else:
                schema = _schema_of_default(defaults[key]) | extra
                _require_complete(path, schema, description)
                self.values.append(Value(path, defaults[key], description, schema, leaf=True))
            properties[key] = ({"description": description} if description else {}) | schema
        return properties

    def _comment(self, line: int, path: tuple[str, ...]) -> tuple[str, Schema]:
        """Return the description above a line, and the keywords in it."""
        comment: list[str] = []
        while line and self._lines[line - 1].lstrip().startswith("#"):
            line -= 1
            comment.insert(0, self._lines[line].lstrip().removeprefix("#").strip())
        words, extra = [], {}
        for text in comment:
            if text.startswith("@schema "):
                extra |= yaml.safe_load(text.removeprefix("@schema "))
            elif text == "@settings":
                extra |= settings_schema()
            elif text.startswith("@"):
                raise ValueError(f"{'.'.join(path)}: {text!r} is neither @schema nor @settings")
            else:
                words.append(text)
        return " ".join(words), extra


def _schema_of_default(default: Any) -> Schema:
    if default is None:
        return {}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return {"type": kinds[type(default)]}


def _require_complete(path: tuple[str, ...], schema: Schema, description: str) -> None:
    name = ".".join(path)
    if not {"type", "enum"} & schema.keys():
        raise ValueError(f"{name}: a default of null does not tell the type: add `@schema {{type: ...}}`")
    if schema.get("type") == "array" and "items" not in schema:
        raise ValueError(f"{name}: a list does not tell what it holds: add `@schema {{items: ...}}`")
    if schema.get("type") == "object" and "additionalProperties" not in schema:
        raise ValueError(
            f"{name}: an empty map does not tell what it holds: add `@schema {{additionalProperties: ...}}`"
        )
    if not description and path[-1] != "enabled":
        raise ValueError(f"{name}: has no comment that says what it is")


def settings_schema() -> Schema:
    """The schema of a map with the server's settings, without those that other values make."""
    properties = {
        name: {"description": field.description} | _setting_schema(field)
        for name, field in Settings.model_fields.items()
        if name not in SETTINGS_OF_THE_CHART
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _setting_schema(field: FieldInfo) -> Schema:
    """What a settings file may hold for a setting; the server itself checks the rest when it starts."""
    kind = field.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return {"enum": list(typing.get_args(kind))}
    if origin is tuple:
        return {"type": ["array", "string"], "items": {"type": "string"}}
    if origin is dict:
        return {"type": ["object", "string"]}
    assert isinstance(origin, type), f"{field}: say here what its schema is"
    if issubclass(origin, enum.Enum):
        return {"enum": [member.value for member in origin]}
    bounds = {
        keyword: bound
        for constraint in field.metadata
        for attribute, keyword in (("ge", "minimum"), ("le", "maximum"), ("gt", "exclusiveMinimum"))
        if (bound := getattr(constraint, attribute, None)) is not None
    }
    for base, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (PurePath, "string")):
        if issubclass(origin, base):
            return {"type": name} | bounds
    raise ValueError(f"{field}: say here what its schema is")


def schema_text(values: ChartValues) -> str:
    """values.schema.json."""
    return json.dumps(values.schema, indent=2) + "\n"


def values_table(values: ChartValues) -> str:
    """The table in Markdown, a row for each value, with the words about a group before its members."""
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for value in values.values:
        name = ".".join(value.path)
        if value.leaf:
            default = json.dumps(value.default, ensure_ascii=False)
            rows.append(f"| `{name}` | `{default}` | {_cell(value.description + _choices(value.schema))} |")
        elif value.description:
            rows.append(f"| **`{name}`** | | {_cell(value.description)} |")
    return "\n".join(rows) + "\n"


def _choices(schema: Schema) -> str:
    if "enum" not in schema:
        return ""
    return " One of " + ", ".join(f"`{json.dumps(choice)}`" for choice in schema["enum"]) + "."


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")


def with_table(readme: str, values: ChartValues) -> str:
    """README's text with the table as it must be."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{values_table(values)}\n{END}{after}"


def generated(chart: Path = CHART) -> Iterator[tuple[Path, str]]:
    """Yield each generated file and its text as it must be."""
    values = ChartValues((chart / "values.yaml").read_text(encoding="utf-8"))
    yield chart / "values.schema.json", schema_text(values)
    readme = chart / "README.md"
    yield readme, with_table(readme.read_text(encoding="utf-8"), values)


if __name__ == "__main__":
    for path, text in generated():
        path.write_text(text, encoding="utf-8")
