"""YAML files of options, read within limits.

YAML lets a short file stand for an endless value: an alias repeats what an anchor named, aliases of aliases grow with every
level, and an anchor may hold itself. So the nodes of a file are counted as they would be with every alias written out,
before any value is made of them. A key that is there twice is refused, where YAML itself keeps the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from graftlm.errors import GraftError

MOST_YAML_BYTES = 1 << 20
MOST_NODES = 100_000
"""Values and keys, aliases written out. A sweep's file has about a hundred."""
MOST_DEPTH = 50
_DIGITS = 300


def read_yaml(path: Path, raises: type[GraftError], *, secret: bool = False) -> Any:
    """The value in a YAML (or JSON) file of at most 1 MB. Raises the given error, which names the file and the position.

    Errors about a `secret` file quote nothing of it, while YAML's own messages show the line.
    """
    try:
        size = path.stat().st_size
        if size > MOST_YAML_BYTES:
            raise raises(f"{path} has {size:,} bytes, and at most {MOST_YAML_BYTES:,} are read; is it the right file?")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise raises(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise raises(f"{path} is not YAML: byte {error.start} is no UTF-8; save it as UTF-8") from None
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Measured().add(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise raises(f"{path} is nested too deep, at most {MOST_DEPTH} levels are read") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date without such a day is a plain ValueError
        if secret:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1})" if mark is not None else ""
            raise raises(f"{path} is not YAML or JSON that can be read{where}") from None
        raise raises(f"{path} is not YAML: {str(error)[:500]}") from None


class _Measured:
    """Counts nodes with every alias written out. Raises ValueError over a limit."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, node: yaml.Node, depth: int = 1) -> None:
        self.count += 1
        where = f"line {node.start_mark.line + 1}"
        if depth > MOST_DEPTH:
            raise ValueError(
                f"{where} is nested too deep, at most {MOST_DEPTH} levels are read; does an alias hold itself?"
            )
        if self.count > MOST_NODES:
            raise ValueError(f"{where}: its aliases stand for more than {MOST_NODES:,} values; write out what is meant")
        if isinstance(node, yaml.ScalarNode):
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _DIGITS:
                raise ValueError(f"{where} has a number of {len(node.value):,} digits, at most {_DIGITS} are read")
        elif isinstance(node, yaml.SequenceNode):
            for inner in node.value:
                self.add(inner, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in keys:
                        raise ValueError(f"line {key.start_mark.line + 1}: '{key.value[:80]}' is there twice; keep one")
                    keys.add(key.value)
                self.add(key, depth + 1)
                self.add(value, depth + 1)
