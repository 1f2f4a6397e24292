"""Make and check the signature of an artifact, with `ssh-keygen -Y` of OpenSSH.

The signature is over the bytes of `post_dist.json`, which holds the hash of every other file.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from post_dist.admission.private_folder import private_folder
from post_dist.artifacts.manifest import FILE_NAME, SIGNATURE
from post_dist.errors import ArtifactRefused, EnvironmentFault, InputError
from post_dist.files import write_file
from post_dist.paths import kind_of

NAMESPACE = "post_dist"
"""Purpose that a signature names. One that was made for git or for mail is refused."""
NOT_SIGNED = "not signed"
_SECONDS_TO_CHECK = 30
_SECONDS_TO_SIGN = 120
"""Time limit of a signature. A person may have to type a passphrase or touch a key."""
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


def check_signature(folder: Path, keys: Sequence[str]) -> str:
    """Check the signature of an artifact.

    Args:
        folder: private copy of the manifest, and of the signature if there is one.
        keys: the trusted public keys; without any, an artifact need not be signed.

    Returns:
        What is known of the signer, in words.

    Raises:
        ArtifactRefused: the signature is not good, or is not by a trusted key.
        EnvironmentFault: OpenSSH is not installed.
    """
    if not (folder / SIGNATURE).exists():
        if keys:
            raise ArtifactRefused(
                "it is not signed, and trusted keys are given",
                "its sender signs it with `post-dist sign`",
            )
        return NOT_SIGNED
    # First whether the signature is good, so that the message can name the key.
    signer = _fingerprint(folder)
    if not keys:
        return f"signed by {signer}, which is not compared with any key"
    if not _is_by(folder, keys):
        raise ArtifactRefused(
            f"it is signed by {signer}, which is not a trusted key",
            "ask its sender for the public key over another way",
        )
    return f"signed by {signer}, a trusted key"


def sign(folder: Path, key: Path, manifest: bytes) -> str:
    """Sign an artifact, and replace the signature that it has.

    Args:
        folder: the artifact, which `verify` has accepted.
        key: a private key, which only ssh-keygen reads; or a public one whose other half an agent
            holds.
        manifest: the manifest that was checked. That in the folder may have been replaced since.

    Returns:
        Fingerprint of the key.

    Raises:
        InputError: the key cannot be used, or the folder cannot be written to.
        EnvironmentFault: OpenSSH is not installed.
    """
    if kind_of(key) != "file":
        raise InputError(f"{key} is not a key file", "`ssh-keygen -t ed25519` makes a key")
    with private_folder() as copy:
        (copy / FILE_NAME).write_bytes(manifest)
        _sign_file(copy / FILE_NAME, key)
        signer = _fingerprint(copy)
        write_file(folder / SIGNATURE, partial(shutil.copyfile, copy / SIGNATURE))
    return signer


def _fingerprint(folder: Path) -> str:
    """Return the fingerprint of the key that has made a good signature."""
    done = _check(folder, ["check-novalidate"])
    found = _FINGERPRINT.search(done.stdout)
    if done.returncode != 0 or found is None:
        raise ArtifactRefused(
            f"{SIGNATURE} is not a good signature: {_reason(done)}", "get the artifact again"
        )
    return found.group()


def _is_by(folder: Path, keys: Sequence[str]) -> bool:
    """Return whether the signature is good and by one of the keys."""
    with private_folder() as place:
        allowed = place / "allowed_signers"
        allowed.write_text("".join(f"{NAMESPACE} {key}\n" for key in keys))
        command = ["verify", "-f", str(allowed), "-I", NAMESPACE]
        return _check(folder, command).returncode == 0


def _check(folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    options = ["-n", NAMESPACE, "-s", str(folder / SIGNATURE)]
    with (folder / FILE_NAME).open() as manifest:
        try:
            # The child needs nothing of our environment.
            return _ssh_keygen([*command, *options], manifest, {}, _SECONDS_TO_CHECK)
        except subprocess.TimeoutExpired:
            raise ArtifactRefused(f"{SIGNATURE} takes too long to check") from None


def _sign_file(path: Path, key: Path) -> None:
    """Write the signature of a file beside it."""
    command = ["sign", "-n", NAMESPACE, "-f", str(key.absolute()), str(path)]
    environment = dict(os.environ)
    terminal = None
    if not os.isatty(0):
        # Nobody could answer a question, so ssh-keygen must not ask.
        environment["SSH_ASKPASS_REQUIRE"] = "never"
        terminal = subprocess.DEVNULL
    try:
        done = _ssh_keygen(command, terminal, environment, _SECONDS_TO_SIGN)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"ssh-keygen did not sign with {key} within {_SECONDS_TO_SIGN} s",
            "answer its question for a passphrase, or touch the key",
        ) from None
    if done.returncode != 0:
        raise InputError(
            f"ssh-keygen cannot sign with {key}: {_reason(done)}",
            "a key with a passphrase needs a terminal or ssh-agent (then give its .pub file)",
        )


def _ssh_keygen(
    command: Sequence[str],
    stdin: IO[str] | int | None,
    environment: Mapping[str, str],
    seconds: float,
) -> subprocess.CompletedProcess[str]:
    """Run `ssh-keygen -Y` in English."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise EnvironmentFault(
            "signatures need ssh-keygen, which is not installed",
            "install OpenSSH (openssh-client on Debian, openssh-clients on Fedora)",
        )
    return subprocess.run(
        [program, "-Y", *command],
        stdin=stdin,
        env={**environment, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
        # Without a terminal of its own, the child cannot wait for one.
        start_new_session=stdin == subprocess.DEVNULL,
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that ssh-keygen has printed as an error."""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1]
