"""Write the blocks of the stages in conf/config.yaml from the dataclasses, in which their defaults and comments stand.

python scripts/write_config.py

Of a block with a ``_target_`` two things are kept: the order of its settings, and values that are taken from another setting,
such as ``${seed}``. Every other value is the default of its field, every comment the field's. A field that the block lacks is
added at its end, a setting without a field leaves.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import pkgutil
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from sparsefinder.commandline.conf_folder import CONF

WIDTH = 120
WORDS = {"None": "null", "True": "true", "False": "false"}
SETTING = re.compile(r"( *)(\w+):(?: ([^#]*[^# ]))?(?:  +# .*)?")


def main() -> None:
    """Write the file, where it is not yet as it should be."""
    path = CONF / "config.yaml"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


def written(text: str) -> str:
    """The text of conf/config.yaml with the blocks of the stages as their classes declare them."""
    lines, result = text.splitlines(), list[str]()
    while lines:
        line = lines.pop(0)
        result.append(line)
        if lines and lines[0].startswith("  _target_: "):
            result += block(taken(lines, 2), 2)
    return "\n".join(result) + "\n"


def taken(lines: list[str], indent: int) -> list[str]:
    """Takes the lines from the front of ``lines`` that are indented so far or farther."""
    size = next((i for i, line in enumerate(lines) if not line.startswith(" " * indent)), len(lines))
    block_lines, lines[:] = lines[:size], lines[size:]
    return block_lines


def block(lines: Sequence[str], indent: int) -> Iterator[str]:
    """The lines of a block with a ``_target_``, written anew."""
    waiting = [line for line in lines[1:] if not line.lstrip().startswith("#")]
    target = lines[0].partition(": ")[2]
    comments, fields = comments_of(target), fields_of(target)
    yield lines[0]
    values: dict[str, str] = {}
    inner: dict[str, list[str]] = {}
    while waiting:
        match = SETTING.fullmatch(waiting.pop(0))
        assert match is not None, "a block of settings holds one KEY: VALUE a line"
        values[match[2]] = match[3] or ""
        inner[match[2]] = taken(waiting, indent + 2)
    for name in [name for name in values if name in fields] + [name for name in fields if name not in values]:
        nested = inner.get(name, [])
        kept = nested or "${" in values.get(name, "")
        value = values[name] if kept else in_yaml(fields[name].default)
        yield from setting(" " * indent + f"{name}:" + (f" {value}" if value else ""), comments.get(name, ""))
        yield from block(nested, indent + 2) if nested else ()


def fields_of(target: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a class; not those for patterns, attentions and conversions, which are chosen in other folders of conf."""
    kind = pkgutil.resolve_name(target)
    hints = typing.get_type_hints(kind)
    return {
        field.name: field
        for field in dataclasses.fields(kind)
        if typing.get_origin(hint := hints[field.name]) is not tuple
        or not any(dataclasses.is_dataclass(item) for item in typing.get_args(hint))
    }


def comments_of(target: str) -> dict[str, str]:
    """What the source says beside or above each field of a class, those that it inherits included; in the words of YAML."""
    comments: dict[str, str] = {}
    for kind in reversed(pkgutil.resolve_name(target).__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(kind))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        said = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        whole_lines = {line for line, token in said.items() if not token.line[: token.start[1]].strip()}
        [definition] = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first, last = node.lineno, node.end_lineno or node.lineno
                while first - 1 in whole_lines:
                    first -= 1
                text = " ".join(said[line].string.lstrip("# ") for line in range(first, last + 1) if line in said)
                comments[node.target.id] = re.sub(r"\b(None|True|False)\b", lambda word: WORDS[word[1]], text)
    return comments


def setting(line: str, comment: str) -> list[str]:
    """A setting with its comment: beside it, or above where that is too long."""
    if not comment:
        return [line]
    if len(f"{line}  # {comment}") <= WIDTH:
        return [f"{line}  # {comment}"]
    indent = " " * (len(line) - len(line.lstrip()))
    return [*textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "), line]


def in_yaml(value: Any) -> str:
    """A default as it is typed in YAML: ``null``, ``3.0e-5``, ``250_000``, ``[0.02, 0.05]``."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(in_yaml(item) for item in value)}]"
    if value is dataclasses.MISSING:
        return "???"  # Hydra asks for it
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return re.sub(r"(\.\d+?)0*e-0?(\d+)", r"\1e-\2", f"{value:e}")
    if type(value) is int and abs(value) >= 100_000:
        return f"{value:_}"
    return yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    main()
