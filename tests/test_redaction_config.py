"""How redaction is configured: its paths, its key, and what is known of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from agent.config.loaded import Loaded
from agent.config.loading import files_beside, load, refresh
from agent.errors import ConfigError
from agent.redaction import machine_id
from agent.reload import Refusal, decide
from agent.settings import Redact, Settings
from agent.units import MASK, Secret

KEY = Secret("0123456789abcdef-one")
OTHER = Secret("0123456789abcdef-two")


def from_text(folder: Path, text: str, **environ: str) -> Loaded:
    file = folder / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, environ)


def test_paths_and_additions_are_read_from_file_and_environment(tmp_path: Path) -> None:
    loaded = from_text(
        tmp_path,
        f"""
        [redact]
        drop = ["properties.email", 'properties."e.mail"']
        key = "{KEY.reveal()}"
        [context]
        agent = ["site=berlin-3"]
        """,
        TRANTHOR_AGENT_REDACT__HASH="userId,traits.email",
        TRANTHOR_AGENT_CONTEXT__MACHINE_ID="true",
    )
    assert loaded.settings.redact == Redact(
        drop=("properties.email", 'properties."e.mail"'), hash=("userId", "traits.email"), key=KEY
    )
    assert loaded.settings.context.agent == ("site=berlin-3",)
    assert loaded.settings.context.machine_id
    assert loaded.unhashable is None


def test_a_path_that_may_not_be_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'\[redact\] drop = .*"userId" would take userId'):
        from_text(tmp_path, '[redact]\ndrop = ["userId"]')


@pytest.mark.parametrize(
    "text", ["short", "schlüssel-schlüssel-schlüssel", "two\\nlines, long enough"]
)
def test_a_key_that_is_none_is_refused_and_not_quoted(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="openssl rand -hex 32") as caught:
        from_text(tmp_path, f'[redact]\nhash = ["userId"]\nkey = "{text}"')
    assert text[:5] not in str(caught.value).removeprefix(str(tmp_path))


def test_the_key_is_read_from_its_file_or_credential_and_shown_nowhere(tmp_path: Path) -> None:
    (tmp_path / "redact_key").write_text(f"{KEY.reveal()}\n")
    text = '[redact]\nhash = ["userId"]'
    of_file = from_text(tmp_path, f'{text}\nkey_file = "redact_key"')
    of_credential = from_text(tmp_path, text, CREDENTIALS_DIRECTORY=str(tmp_path))

    for loaded, origin in (
        (of_file, str(tmp_path / "redact_key")),
        (of_credential, "credential redact_key"),
    ):
        assert loaded.settings.redact.key == KEY
        assert loaded.origins["redact.key"] == origin
        assert loaded.problems == ()
        assert KEY.reveal() not in repr(loaded)
        assert MASK in repr(loaded)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    for loaded in (of_file, of_credential):
        assert tmp_path / "redact_key" in files_beside(loaded, environ)
        (tmp_path / "redact_key").write_text(OTHER.reveal())
        assert refresh(loaded, environ).settings.redact.key == OTHER
        (tmp_path / "redact_key").write_text(KEY.reveal())


UNHASHABLE: dict[str, tuple[bytes | None, str]] = {
    "no file": (None, "cannot be read (No such file or directory)"),
    "empty": (b"\n", "the file is empty; put the key into it"),
    "short": (b"secret", "16 characters at least"),
    "of bytes": (bytes(range(128, 160)), "one line of printable ASCII"),
}


@pytest.mark.parametrize(("content", "told"), UNHASHABLE.values(), ids=UNHASHABLE.keys())
def test_without_its_key_nothing_is_hashed_in_another_way(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "redact_key").write_bytes(content)
    loaded = from_text(tmp_path, '[redact]\nhash = ["userId"]\nkey_file = "redact_key"')
    assert loaded.settings.redact.key is None
    assert loaded.unhashable == loaded.problems[0]
    assert loaded.unhashable.startswith("redact.key_file = ")
    assert told in loaded.unhashable


def test_a_key_that_nobody_gave_is_asked_for_and_one_that_nobody_needs_is_not(
    tmp_path: Path,
) -> None:
    unhashable = from_text(tmp_path, '[redact]\nhash = ["userId"]').unhashable
    assert unhashable is not None
    assert unhashable.startswith(
        "redact.hash needs a key, and there is none: set redact.key_file in"
    )
    assert from_text(tmp_path, '[redact]\nkey_file = "gone"\ndrop = ["files"]').problems == ()


def test_two_keys_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[redact\] key .* and key_file .* are both set"):
        from_text(tmp_path, f'[redact]\nkey = "{KEY.reveal()}"\nkey_file = "redact_key"')


@pytest.mark.parametrize("problems", [["redact.hash needs a key"], []])
def test_no_agent_takes_a_configuration_by_which_it_would_not_hash(problems: list[str]) -> None:
    new = Settings(redact=Redact(hash=("userId",)))
    assert isinstance(decide(Settings(), new, problems), Refusal)


# --- this machine -------------------------------------------------------------------------------


def test_the_id_of_a_machine_is_not_the_one_in_etc() -> None:
    known = "0123456789abcdef0123456789abcdef"
    assert machine_id(known) == "ac079f0ec52f4c9eac08b705b646328b"
    assert machine_id(known) != machine_id(known[::-1])


def test_it_is_made_as_systemd_makes_one() -> None:
    binary, file = shutil.which("systemd-id128"), Path("/etc/machine-id")
    if binary is None or not file.exists():
        pytest.skip("systemd-id128 or /etc/machine-id is not here")
    theirs = subprocess.run(
        [binary, "machine-id", "--app-specific=9a012db3-f662-48bc-afec-12faf9d8dd09"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()
    assert machine_id(file.read_text().strip()) == theirs


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", "3D1219C7"])
def test_a_machine_without_an_id_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    file = tmp_path / "machine-id"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr("agent.config.loading.MACHINE_ID_FILE", file)
    loaded = from_text(tmp_path, "[context]\nmachine_id = true")
    assert loaded.machine_id == ""
    (problem,) = loaded.problems
    assert problem.startswith(f"context.machine_id = true: {file}: ")
    assert "name the machine in context.agent" in problem
