"""Public keys of OpenSSH, which the run file and `verify --key` name to trust signatures."""

import base64
import binascii
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from post_dist.errors import InputError

_LINE = re.compile(
    r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)"
    r"|sk-ssh-ed25519@openssh\.com|sk-ecdsa-sha2-nistp256@openssh\.com)"
    r" ([A-Za-z0-9+/]{32,4096}={0,2})(?: .*)?"
)
_FORM = "is not a public key such as 'ssh-ed25519 AAAA...', as a .pub file of ssh-keygen holds it"
_LENGTH_BYTES = 4
_MOST_CHARACTERS = 1 << 13


def public_key(line: str) -> str:
    """Return a line of a `.pub` file without its comment.

    The key is later written into a file of allowed signers. So nothing else may be in the line,
    such as an option or a second line.

    Raises:
        ValueError: it is no public key, or has an unknown type.
    """
    match = _LINE.fullmatch(line)
    if match is None or not line.isprintable():
        raise ValueError(_FORM)
    kind, body = match.groups()
    try:
        content = base64.b64decode(body, validate=True)
    except binascii.Error:
        raise ValueError(_FORM) from None
    # The key begins with its type, as a text behind its length.
    if not content.startswith(len(kind).to_bytes(_LENGTH_BYTES) + kind.encode()):
        raise ValueError(_FORM)
    return f"{kind} {body}"


PublicKey = Annotated[str, AfterValidator(public_key)]


def read_public_key(text: str) -> str:
    """Return a public key that is given as a line, or as the path of a `.pub` file.

    Raises:
        InputError: it is neither.
    """
    try:
        return public_key(text)
    except ValueError as problem:
        reason = problem
    try:
        with Path(text).open() as file:
            return public_key(file.read(_MOST_CHARACTERS).strip())
    except (OSError, ValueError):
        raise InputError(f"{text:.100} {reason}", "or give the path of such a file") from None
