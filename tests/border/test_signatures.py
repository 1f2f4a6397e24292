"""Signatures with ssh keys: what is refused with a pinned key, and what is said without one."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from border.hostile import Change, edit_json, put_text, replace_by_fifo, replace_by_link, sign

import post_dist
from post_dist.admission.door import admit_student
from post_dist.artifacts.manifest import FILE_NAME, SIGNATURE
from post_dist.artifacts.prompt import read_prompt
from post_dist.errors import ArtifactRefused, EnvironmentFault, InputError
from post_dist.verify import verify

PROMPT = Path(__file__).parents[1] / "data/artifacts_0_1_0/source_prompt"
STUDENT = Path(__file__).parents[1] / "data/artifacts_0_1_0/student"


def ssh_keygen(*arguments: object) -> None:
    subprocess.run(["ssh-keygen", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of the sender and of others."""
    folder = tmp_path_factory.mktemp("keys")
    for name, kind in (("sender", "ed25519"), ("other", "ed25519"), ("curve", "ecdsa")):
        ssh_keygen("-q", "-t", kind, "-N", "", "-f", folder / name)
    ssh_keygen("-q", "-t", "ed25519", "-N", "secret", "-f", folder / "locked")
    return folder


def line(key: Path) -> str:
    return key.with_suffix(".pub").read_text().strip()


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    return shutil.copytree(PROMPT, tmp_path / "sent")


@pytest.fixture
def signed(sent: Path, keys: Path, main: Callable) -> Path:
    code, out, err = main("sign", sent, "--key", keys / "sender")
    assert code == 0, err
    assert "signed by SHA256:" in out
    return sent


@pytest.mark.parametrize("name", ["sender", "curve"])
def test_a_signed_prompt_passes_with_its_key(
    sent: Path, keys: Path, main: Callable, name: str
) -> None:
    assert main("sign", sent, "--key", keys / name)[0] == 0
    trusted = [keys / "other.pub", line(keys / name)]
    code, out, _ = main("verify", sent, *(f"--key={key}" for key in trusted), "--json")
    assert code == 0
    assert json.loads(out)["signature"].endswith("a trusted key")
    wanted = read_prompt(PROMPT).embeddings
    assert post_dist.load_prompt(sent, keys=trusted).embeddings.equal(wanted)
    # Our own readers take it too.
    assert read_prompt(sent).embeddings.equal(wanted)


def test_without_a_pinned_key_the_signature_is_told(signed: Path) -> None:
    assert verify(PROMPT)["signature"] == "not signed"
    found = verify(signed)
    assert found["ok"]
    assert found["signature"].startswith("signed by SHA256:")
    assert "not compared with any key" in found["signature"]


def other_file(folder: Path) -> None:
    """Change a file, and the manifest with it."""
    edit_json("task.json", init_text="Other")(folder)
    signature = (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).unlink()
    sign(folder)
    (folder / SIGNATURE).write_bytes(signature)


def other_namespace(folder: Path) -> None:
    (folder / SIGNATURE).unlink()
    key = folder.parent / "sender"
    ssh_keygen("-Y", "sign", "-n", "git", "-f", key, folder / FILE_NAME)


def by_another(folder: Path) -> None:
    (folder / SIGNATURE).unlink()
    key = folder.parent / "other"
    ssh_keygen("-Y", "sign", "-n", "post_dist", "-f", key, folder / FILE_NAME)


CHANGES: dict[str, tuple[Change, str]] = {
    "unsigned": (lambda folder: (folder / SIGNATURE).unlink(), "it is not signed"),
    "by another": (by_another, "not a trusted key"),
    "for another purpose": (other_namespace, "namespace does not match"),
    "a file changed": (edit_json("task.json", init_text="Other"), "not the file that was written"),
    "a file and the manifest changed": (other_file, "incorrect signature"),
    "a space in the manifest": (
        lambda folder: (folder / FILE_NAME).open("a").write(" "),
        "incorrect signature",
    ),
    "garbage": (put_text(SIGNATURE, "garbage"), "is not a good signature"),
    "nothing": (put_text(SIGNATURE, ""), "is not a good signature"),
    "bytes": (put_text(SIGNATURE, os.urandom(999)), "is not a good signature"),
    "huge": (put_text(SIGNATURE, b"-" * 16385), "larger than 16384 bytes"),
    "a link": (replace_by_link(SIGNATURE), "not a regular file"),
    "a FIFO": (replace_by_fifo(SIGNATURE), "not a regular file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_sender_has_not_signed_is_refused(
    signed: Path, keys: Path, main: Callable, change: str
) -> None:
    for name in ("sender", "other"):
        shutil.copy(keys / name, signed.parent)
    alter, reason = CHANGES[change]
    alter(signed)
    code, out, _ = main("verify", signed, "--key", keys / "sender.pub")
    assert code == 4
    assert reason in out
    with pytest.raises(ArtifactRefused, match=reason):
        post_dist.load_prompt(signed, keys=[keys / "sender.pub"])
    # Without a key, only what has no good signature is refused.
    assert verify(signed)["ok"] == (change in ("unsigned", "by another"))


def test_a_signature_is_no_listed_file(signed: Path, keys: Path) -> None:
    sign(signed)
    with pytest.raises(ArtifactRefused, match=SIGNATURE):
        post_dist.load_prompt(signed)


def test_signing_again_replaces_the_signature(signed: Path, keys: Path, main: Callable) -> None:
    assert main("sign", signed, "--key", keys / "other")[0] == 0
    assert main("verify", signed, "--key", keys / "other.pub")[0] == 0
    assert main("verify", signed, "--key", keys / "sender.pub")[0] == 4


@pytest.mark.parametrize("old", ["", "no signature", "x" * 20_000])
def test_a_damaged_signature_of_ones_own_is_replaced(
    signed: Path, keys: Path, main: Callable, old: str
) -> None:
    (signed / SIGNATURE).write_text(old)
    code, _, err = main("sign", signed, "--key", keys / "sender")
    assert (code, err) == (0, "")
    assert main("verify", signed, "--key", keys / "sender.pub")[0] == 0


def test_what_verify_refuses_is_not_signed(sent: Path, keys: Path, main: Callable) -> None:
    edit_json("privacy.json", epsilon=0.01)(sent)
    sign(sent)
    code, out, err = main("sign", sent, "--key", keys / "sender")
    assert code == 4
    assert "epsilon" in out
    assert "is not signed" in err
    assert not (sent / SIGNATURE).exists()


def test_what_was_checked_is_signed(sent: Path, keys: Path, monkeypatch: Any) -> None:
    """Somebody replaces the manifest between the check and the signature."""
    from post_dist import verify as module
    from post_dist.commands import artifacts

    check = module.verified_manifest

    def then_replaced(folder: Path, **options: bool) -> tuple[dict, bytes]:
        found = check(folder, **options)
        edit_json("post_dist.json", config={"forged": True})(folder)
        return found

    with monkeypatch.context() as replaced:
        replaced.setattr(module, "verified_manifest", then_replaced)
        artifacts.sign(sent, keys / "sender")
    assert "incorrect signature" in str(verify(sent)["problems"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("locked", "incorrect passphrase"),
        ("missing", "is not a key file"),
    ],
)
def test_a_key_that_cannot_sign(
    sent: Path, keys: Path, main: Callable, name: str, reason: str
) -> None:
    """A passphrase is not asked for without a terminal: the command ends."""
    code, _, err = main("sign", sent, "--key", keys / name)
    assert code == 2
    assert reason in err
    assert not (sent / SIGNATURE).exists()


@pytest.mark.parametrize(
    "text",
    [
        "cert-authority {}",
        'namespaces="git" {}',
        "* {}",
        "{} a\npost_dist ssh-ed25519 AAAA",
        "{}\n{}",
        "{}\r",
        "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIJ0NBDhLwUcGZ8yUtKl6jGOBZdiqeSlWXvlu9iBlv6vd",
        "ssh-dss AAAAB3NzaC1kc3MAAACBAJ0NBDhLwUcGZ8yUtKl6jGOBZdiqeSlWXvlu9iBlv6vd",
        "ssh-ed25519 not base64",
        "",
    ],
)
def test_a_line_that_is_no_key_alone_is_refused(
    sent: Path, keys: Path, main: Callable, text: str
) -> None:
    own = line(keys / "sender")
    wrong = text.replace("{}", own)
    code, _, err = main("verify", sent, "--key", wrong)
    assert code == 2, err
    assert "is not a public key" in err
    run = tiny.write_run(sent.parent / "run")
    code, _, err = main("tune", run, f"--set=inputs.trusted_keys={json.dumps([wrong])}")
    assert code == 2
    assert "inputs.trusted_keys.0: is not a public key" in err


def test_a_stage_takes_only_what_a_pinned_key_has_signed(
    sent: Path, keys: Path, main: Callable
) -> None:
    """`evaluate` reads a prompt and a student through the door, as the other stages do."""
    run = tiny.write_run(sent.parent / "run")
    student = shutil.copytree(STUDENT, sent.parent / "student")
    pinned = f"--set=inputs.trusted_keys={json.dumps([line(keys / 'sender')])}"
    given = [f"--set=inputs.student={student}", f"--set=inputs.source_prompt={sent}", pinned]
    given += ["--set=teacher=null", "--set=evaluate.baselines=[]"]

    for folder in (student, sent):
        code, _, err = main("evaluate", run, *given)
        assert code == 4
        assert f"{folder}: it is not signed" in err
        assert main("sign", folder, "--key", keys / "sender")[0] == 0
    code, _, err = main("evaluate", run, *given)
    assert code == 0, err
    assert "a trusted key" in err

    # A folder without a manifest is one's own model only if no key is pinned.
    (student / FILE_NAME).unlink()
    code, _, err = main("tune", run, f"--set=inputs.student={student}", pinned)
    assert code == 4
    assert f"no {FILE_NAME}" in err


def test_an_admitted_student_keeps_no_signature(tmp_path: Path, keys: Path, main: Callable) -> None:
    student = shutil.copytree(STUDENT, tmp_path / "student")
    assert main("sign", student, "--key", keys / "sender")[0] == 0
    admitted = admit_student(student, tmp_path / "place", [line(keys / "sender")])
    assert not (admitted / SIGNATURE).exists()
    # What an earlier command has admitted does not stand in for a signature.
    with pytest.raises(ArtifactRefused, match="not a trusted key"):
        admit_student(student, tmp_path / "place", [line(keys / "other")])


def test_ssh_keygen_is_missing(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(keys))
    with pytest.raises(EnvironmentFault, match="ssh-keygen"):
        verify(signed)


def test_a_private_key_is_no_trusted_key(sent: Path, keys: Path) -> None:
    with pytest.raises(InputError) as refused:
        post_dist.load_prompt(sent, keys=[keys / "sender"])
    assert "PRIVATE" not in str(refused.value)
