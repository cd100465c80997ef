"""Reads YAML as other tools do, and refuses what is certainly a mistake or an attack.

Beyond PyYAML's safe loader: a number such as ``1e-3`` is a number although it has no dot (YAML
1.2), merge keys work at every depth, a repeated key is an error, and size and nesting are bounded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..common.optional import require
from ..errors import WavpruneError

try:
    import yaml
except ImportError:
    require("yaml", extra="sweep", purpose="a sweep")
    raise

FILE_BYTES = 1 << 20
# Nodes of the document, those behind an alias counted at each use.
NODES = 100_000
DEPTH = 100

_FLOAT = "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        WavpruneError: the file cannot be read, is not YAML, or is too large.
    """
    if path.exists() and not path.is_file():
        raise WavpruneError(f"{path} is not a file; allowed: a sweep file in YAML")
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise WavpruneError(f"{path}: {error.strerror}; allowed: a sweep file in YAML") from error
    if len(text) > FILE_BYTES:
        raise WavpruneError(f"{path} is larger than {FILE_BYTES:,} bytes; no sweep file is")
    try:
        return yaml.load(text.decode("utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WavpruneError(f"{path} is not YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self._depth += 1
        if self._depth > DEPTH:
            raise _problem(f"nested more than {DEPTH} deep", self.get_mark())
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if not is_alias:
            self._sizes[node] = self._size(node)
        elif node not in self._sizes:
            raise _problem("a value contains itself", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    raise _problem(f"the key {key.value!r} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace merge keys; PyYAML 6.0.4 lets merged values win over a mapping's own."""
        sources: list[yaml.Node] = []
        own = []
        for key, value in node.value:
            if key.tag == _MERGE:
                sources += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                own.append((key, value))
        merged = []
        # Of equal keys the last one counts, and the first source takes precedence.
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                raise _problem("only mappings can be merged", source.start_mark)
            self.flatten_mapping(source)
            merged += source.value
        node.value = merged + own

    def _size(self, node: yaml.Node) -> int:
        """How many nodes a node stands for, with every alias written out."""
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        size = 1 + sum(self._sizes[child] for child in children)
        if size > NODES:
            raise _problem(f"its aliases stand for more than {NODES:,} values", node.start_mark)
        return size


def _problem(message: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)


_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$", re.ASCII),
    list("-+.0123456789"),
)
