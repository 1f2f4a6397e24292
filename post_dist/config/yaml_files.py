"""Read YAML as users mean it: `no` is a word, `1e-3` is a number, and duplicate keys are errors.

PyYAML follows YAML 1.1, where `no` is a boolean, `1e-3` is a string and `24:00:00` is 86400. The
loader here changes those three rules and refuses duplicate keys. tests/unit/test_yaml_files.py
records what it accepts. It stays on PyYAML because ruamel.yaml 0.19.1 lets a duplicate key pass
where `<<` is also used.
"""

import re
from typing import Any

import yaml

from post_dist.errors import InputError

_MERGE_TAG = "tag:yaml.org,2002:merge"
_BOOL_TAG = "tag:yaml.org,2002:bool"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_INT_TAG = "tag:yaml.org,2002:int"

_BOOL = re.compile(r"^(?:true|false)$")
_INT = re.compile(
    r"^[-+]?"
    r"(?:0b[01_]+"  # binary
    r"|0x[0-9a-fA-F_]+"  # hexadecimal
    r"|0[0-7_]*"  # octal, and zero
    r"|[1-9][0-9_]*)$"
)
_MOST_DEPTH = 100
"""Levels of mappings and lists in each other. The scanner's time grows with their square."""
_FLOAT = re.compile(
    r"^[-+]?"
    r"(?:[0-9][0-9_]*\.[0-9_]*"  # 1. and 1_000.5
    r"|\.[0-9]+"  # .5
    r"|[0-9]+(?=[eE]))"  # 1 if an exponent follows
    r"(?:[eE][-+]?[0-9]+)?$"
)


_BEGINNINGS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_ENDS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with its own rules for booleans, numbers and duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and refuse duplicate keys.

        This runs before `<<` adds the keys of another mapping, which the mapping's own keys may
        override.
        """
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                key = key_node.value
            else:
                key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' appears twice", key_node.start_mark
                )
            seen.add(key)
        return node


def _use_own_rules() -> None:
    """Replace the patterns by which `_Loader` recognizes booleans and numbers."""
    replaced = (_BOOL_TAG, _INT_TAG, _FLOAT_TAG)
    own: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for first_character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        own[first_character] = [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
    _Loader.yaml_implicit_resolvers = own
    _Loader.add_implicit_resolver(_BOOL_TAG, _BOOL, list("tf"))
    _Loader.add_implicit_resolver(_INT_TAG, _INT, list("-+0123456789"))
    _Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


_use_own_rules()


def read_yaml(text: str, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        where: the source of the document, for the message.

    Raises:
        InputError: the text is not valid YAML, has a duplicate key, is nested too deeply, or holds
            a character that no file can hold.
    """
    try:
        # An escape such as "\ud800" makes half a character. So does a byte that is no UTF-8, on
        # the command line. Tokenizers and files take whole ones only.
        depth = 0
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.ScalarToken):
                token.value.encode()
            depth += isinstance(token, _BEGINNINGS) - isinstance(token, _ENDS)
            if depth > _MOST_DEPTH:
                raise RecursionError
        return yaml.load(text, Loader=_Loader)
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a character, such as \\ud800") from None
    except RecursionError:
        raise InputError(f"{where} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{where} is not valid YAML: {error}") from None


def write_yaml(value: Any) -> str:
    """Return a value as a YAML document, with the keys in their given order."""
    return yaml.safe_dump(value, sort_keys=False)
