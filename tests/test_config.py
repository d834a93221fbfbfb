"""Claims about the configuration: what is accepted, what wins, what an error tells a person."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config.loaded import Loaded, effective
from agent.config.loading import files_beside, load, refresh
from agent.config.places import search_path
from agent.errors import ConfigError
from agent.keys import example
from agent.settings import Forward, Ingest, Outbox, Settings, Upstream
from agent.units import MASK, Bytes, ProxyUrl, Seconds, WriteKey

KEY = "wk_S3cr3t"
REPOSITORY = Path(__file__).parent.parent


def from_text(tmp_path: Path, text: str, environ: Mapping[str, str] | None = None) -> Loaded:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, environ or {})


def fault(tmp_path: Path, text: str, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, text, environ)
    return str(caught.value)


def from_environ(**variables: str) -> Loaded:
    environ = {f"TRANTHOR_AGENT_{name}": text for name, text in variables.items()}
    return load(None, environ, search=())


def told_of(variables: Mapping[str, str]) -> str:
    """Return what is told of these variables; nothing if they are accepted."""
    try:
        from_environ(**variables)
    except ConfigError as exc:
        return str(exc)
    return ""


KEYS = {shown.key.replace(".", "__").upper() for shown in effective(from_environ())}


# --- defaults and the example ---


def test_without_file_and_environment_the_defaults_hold() -> None:
    loaded = load(None, {"STATE_DIRECTORY": "/var/lib/tranthor-agent"}, search=())

    assert loaded.settings == Settings(
        outbox=Outbox(path=Path("/var/lib/tranthor-agent/outbox.db"))
    )
    assert loaded.file is None
    assert loaded.problems == ()
    assert loaded.origins["ingest.port"] == "default"


def test_the_promised_defaults() -> None:
    settings = Settings()

    assert (settings.ingest.host, settings.ingest.port) == ("127.0.0.1", 7227)
    assert settings.ingest.max_body == 5_242_880
    assert settings.outbox.max_size == 2**30
    assert settings.outbox.when_full == "reject"
    assert settings.outbox.max_age is None
    assert settings.outbox.delivered_retention == 7 * 24 * 3600.0
    assert (settings.upstream.connect_timeout, settings.upstream.timeout) == (10.0, 30.0)
    assert (settings.forward.concurrency, settings.forward.order) == (8, "per_user")
    assert (settings.forward.backoff_base, settings.forward.backoff_max) == (1.0, 300.0)
    assert settings.forward.max_attempts == 20
    assert settings.forward.give_up_after == 3600.0
    assert settings.forward.give_up_unproven_after == 24 * 3600.0
    assert settings.forward.hold_probe == 60.0
    assert (settings.log.level, settings.log.format) == ("info", "auto")


def test_the_example_in_the_repository_is_the_generated_one() -> None:
    text = (REPOSITORY / "config.example.toml").read_text(encoding="utf-8")

    assert text == example(), "write it again: the text of agent.keys.example()"


def test_the_example_fits_a_screen_and_leaves_no_key_out() -> None:
    lines = example().splitlines()

    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line != line.rstrip()] == []
    keys = [found[1] for line in lines if (found := re.match(r"#(\w+) = ", line))]
    assert keys == [shown.key.partition(".")[2] for shown in effective(from_environ())]


@pytest.mark.parametrize("uncomment", [False, True])
def test_the_example_changes_no_default(tmp_path: Path, uncomment: bool) -> None:
    text = re.sub(r"(?m)^#(\w+ = )", r"\1", example()) if uncomment else example()

    loaded = from_text(tmp_path, text)

    assert loaded.settings == load(None, {}, search=()).settings
    assert loaded.problems == ()


def test_every_default_lies_in_its_own_range(tmp_path: Path) -> None:
    shown = effective(from_environ())

    for key in shown:
        section, name = key.key.split(".")
        from_text(tmp_path, f"[{section}]\n{name} = {key.value}\n")


# --- where a value comes from ---


def test_the_environment_overrides_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    loaded = from_text(
        tmp_path,
        '[ingest]\nport = 1\n[log]\nlevel = "debug"',
        {"TRANTHOR_AGENT_INGEST__PORT": "2"},
    )

    assert (loaded.settings.ingest.port, loaded.settings.log.level) == (2, "debug")
    assert loaded.origins["ingest.port"] == "environment TRANTHOR_AGENT_INGEST__PORT"
    assert loaded.origins["log.level"] == str(tmp_path / "config.toml")
    assert loaded.origins["log.format"] == "default"


def test_the_environment_is_typed_by_the_key() -> None:
    loaded = from_environ(
        INGEST__PORT="0",
        INGEST__ALLOWED_HOSTS="till.local, kiosk.local,",
        INGEST__MAX_BODY="64KiB",
        OUTBOX__MAX_AGE="",
        UPSTREAM__WRITE_KEY="123",
        FORWARD__HOLD_PROBE="500ms",
    )

    assert loaded.settings.ingest == Ingest(
        port=0, allowed_hosts=("till.local", "kiosk.local"), max_body=Bytes(65_536)
    )
    assert loaded.settings.outbox.max_age is None
    assert loaded.settings.upstream.write_key == WriteKey("123")
    assert loaded.settings.forward == Forward(hold_probe=Seconds(0.5))


def test_a_named_file_is_preferred_to_the_variable_and_that_to_the_search(tmp_path: Path) -> None:
    files = [tmp_path / f"{port}.toml" for port in (1, 2, 3)]
    for file in files:
        file.write_text(f"[ingest]\nport = {file.stem}")
    variable = {"TRANTHOR_AGENT_CONFIG": str(files[1])}
    search = [tmp_path / "none.toml", files[2]]

    assert load(files[0], variable, search=search).settings.ingest.port == 1
    assert load(None, variable, search=search).settings.ingest.port == 2
    assert load(None, {}, search=search).settings.ingest.port == 3
    assert load(None, {}, search=search).file == files[2]


def test_the_users_folder_is_searched_before_etc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/me/.config")

    assert search_path() == (
        Path("/home/me/.config/tranthor-agent/config.toml"),
        Path("/etc/tranthor-agent/config.toml"),
    )


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_named_file_must_exist(tmp_path: Path, by_variable: bool) -> None:
    file = tmp_path / "gone.toml"

    with pytest.raises(ConfigError, match=r"gone\.toml: no such file; .*config init"):
        load(None if by_variable else file, {"TRANTHOR_AGENT_CONFIG": str(file)})


def test_a_file_that_was_found_but_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(None, {}, search=[tmp_path])


def test_a_file_saved_on_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbf[ingest]\r\nport = 1\r\n")

    assert load(tmp_path / "config.toml", {}).settings.ingest.port == 1


def test_an_outbox_without_a_path_goes_to_the_state_directory(tmp_path: Path) -> None:
    loaded = load(None, {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, search=())

    assert loaded.settings.outbox.path == Path("/var/lib/a/outbox.db")
    assert loaded.origins["outbox.path"] == "environment STATE_DIRECTORY"


def test_an_outbox_without_state_directory_goes_to_the_users_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/home/me/data")

    path = load(None, {}, search=()).settings.outbox.path

    assert path == Path("/home/me/data/tranthor-agent/outbox.db")


def test_a_path_in_a_file_starts_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    loaded = from_text(tmp_path, '[outbox]\npath = "events.db"\n[upstream]\nca_file = "~/ca.pem"')

    assert loaded.settings.outbox.path == tmp_path / "events.db"
    assert loaded.settings.upstream.ca_file == Path("/home/me/ca.pem")


def test_a_path_in_the_environment_starts_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert from_environ(OUTBOX__PATH="o.db").settings.outbox.path == tmp_path / "o.db"


# --- values that cannot be meant ---

FAULTS = {
    "unknown key": ("[upstream]\ntimout = 3", "[upstream] timout: unknown key; did you mean timeout?"),
    "unlike any key": ("[log]\nxyzzy = 3", "[log] xyzzy: unknown key; there are level, format"),
    "key of another section": ('[ingest]\nurl = ""', "unknown key; it belongs to [upstream]"),
    "unknown section": ("[upstrem]", "[upstrem]: unknown section; did you mean upstream?"),
    "key without section": ("port = 1", "port stands in no section: put it beneath [ingest]"),
    "section as a key": ("ingest = 1", "ingest is a section: write [ingest], and its keys beneath"),
    "low": ("[ingest]\nport = -1", "[ingest] port = -1: expected a whole number from 0 to 65535"),
    "high": ("[ingest]\nport = 65536", "expected a whole number from 0 to 65535"),
    "text for number": ('[ingest]\nport = "x"', 'port = "x": expected a whole number from 0 to'),
    "bool for number": ("[ingest]\nport = true", "port = true: expected a whole number from 0"),
    "number for text": ("[ingest]\nhost = 1", 'host = 1: expected a loopback address or "localhost"'),
    "other word": ('[log]\nlevel = "x"', 'level = "x": expected "debug", "info", "warning" or "error"'),
    "window": ('[forward]\nwindows = ["22-6"]', 'Write two times of day, such as "22:00-06:00"'),
    "window of no time": ('[forward]\nwindows = ["06:00-06:00"]', "never opens"),
    "other mode": ('[upstream]\nmode = "x"', 'mode = "x": expected "track"'),
    "bare duration": ("[upstream]\ntimeout = 30", 'timeout = 30: a duration needs a unit: write "30s"'),
    "odd duration": ('[upstream]\ntimeout = "30"', "expected a duration: numbers with the units d, h"),
    "short duration": ('[upstream]\ntimeout = "0s"', 'expected a duration from "100ms" to "1h"'),
    "no age": ('[outbox]\nmax_age = "0s"', 'expected a duration from "1s" to "36500d"'),
    "bare size": ("[ingest]\nmax_body = 5", 'max_body = 5: a size needs a unit: write "5B"'),
    "big body": ('[ingest]\nmax_body = "6MiB"', 'expected a size from "1KiB" to "5MiB"'),
    "small outbox": ('[outbox]\nmax_size = "1KiB"', 'expected a size from "1MiB" to "16384GiB"'),
    "open host": ('[ingest]\nhost = "0.0.0.0"', "not a loopback address. Whoever reaches the agent"),
    "host list": ('[ingest]\nallowed_hosts = "a"', '"a": expected a list of host names without port'),
    "host with port": ('[ingest]\nallowed_hosts = ["a:1"]', '"a:1" is not a host name'),
    "any host": ('[ingest]\nallowed_hosts = ["*"]', '"*" is not a host name'),
    "any origin": ('[ingest]\nallowed_origins = ["*"]', '"*" would let pages of strangers post'),
    "null origin": ('[ingest]\nallowed_origins = ["null"]', '"null" would let pages of strangers'),
    "origin with path": (
        '[ingest]\nallowed_origins = ["https://a.example/"]',
        'an origin has no path, user or query: write "https://a.example"',
    ),
    "origin without scheme": ('[ingest]\nallowed_origins = ["a.example"]', "is not an origin"),
    "origin in letters of no name": ('[ingest]\nallowed_origins = ["https://ä.x"]', "is not an origin"),
    "origin with a broken port": ('[ingest]\nallowed_origins = ["http://a:"]', "is not an origin"),
    "origins by wildcard": ('[ingest]\nallowed_origins = ["https://*.a.x"]', "has a wildcard. Name each"),
    "origin of files": ('[ingest]\nallowed_origins = ["file://"]', "pages from files have no origin"),
    "relative socket": ('[ingest]\nunix_socket = "a"', "expected a whole path, such as"),
    "long socket": (f'[ingest]\nunix_socket = "/{"x" * 107}"', "has at most 107 bytes"),
    "endpoint for url": (
        '[upstream]\nurl = "https://app.tranthor.com/api/public/apps/track"',
        'the agent adds the path itself: write url = "https://app.tranthor.com"',
    ),
    "url without scheme": ('[upstream]\nurl = "app.tranthor.com"', 'as "https://app.tranthor.com"'),
    "url of another kind": ('[upstream]\nurl = "ftp://a"', "ftp:// is not spoken here"),
    "url without host": ('[upstream]\nurl = "https://"', "there is no host"),
    "url with bad port": ('[upstream]\nurl = "https://a:b"', "host or port cannot be read"),
    "socks proxy": ('[upstream]\nproxy = "socks5://p:1"', "expected the address of an HTTP proxy"),
    "key without cert": ('[upstream]\nclient_key = "k"', "client_key is of no use without client_cert"),
    "cap below base": ('[forward]\nbackoff_base = "10m"', 'backoff_max = "5m": shorter than backoff_base'),
    "control character": ('[outbox]\npath = "a\\u0000"', "a control character cannot be meant"),
    "syntax": ("[ingest]\nport = \n", "not valid TOML: Invalid value (at line 2, column 8)"),
    "no quotes": ("[log]\nlevel = debug\n", "texts, durations and sizes need quotes"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "told"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_one_line_that_names_the_file_and_says_what_to_do(
    tmp_path: Path, text: str, told: str
) -> None:
    message = fault(tmp_path, text)

    assert message.startswith(f"{tmp_path / 'config.toml'}: ")
    assert told in message
    assert "\n" not in message


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = '[ingest]\nport = -1\nhots = "x"\n[log]\nlevel = "x"\n[nonsense]'

    lines = fault(tmp_path, text, {"TRANTHOR_AGENT_FORWARD__ORDER": "x"}).splitlines()

    assert len(lines) == 5
    assert lines[-1] == (
        'environment: TRANTHOR_AGENT_FORWARD__ORDER = "x": expected "per_user" or "none"'
    )


def test_a_file_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b'[log]\nlevel = "\xe9"')

    with pytest.raises(ConfigError, match=r"not UTF-8 \(at byte 15\)"):
        load(tmp_path / "config.toml", {})


def test_an_unknown_variable_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean TRANTHOR_AGENT_UPSTREAM__URL\?"):
        from_environ(UPSTREAM__ULR="https://a.example")


def test_one_underscore_is_a_problem_and_other_variables_are_not_ours() -> None:
    loaded = from_environ(INGEST_PORT="1", PORT="tcp://10.0.0.1:1", SERVICE_HOST="10.0.0.1")

    assert loaded.settings.ingest.port == 7227
    (problem,) = loaded.problems
    assert problem == (
        "environment: TRANTHOR_AGENT_INGEST_PORT is ignored;"
        " did you mean TRANTHOR_AGENT_INGEST__PORT?"
    )


# --- values in one form ---


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_addresses_are_listened_on(host: str) -> None:
    assert from_environ(INGEST__HOST=host).settings.ingest.host == host


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        ("https://app.tranthor.com/", "https://app.tranthor.com"),
        ("HTTPS://App.Tranthor.com", "https://app.tranthor.com"),
        ("http://[::1]:3001", "http://[::1]:3001"),
        ("", ""),
    ],
)
def test_an_upstream_is_kept_as_its_root(given_: str, kept: str) -> None:
    assert from_environ(UPSTREAM__URL=given_).settings.upstream.url == kept


def test_origins_and_hosts_are_kept_as_browsers_send_them() -> None:
    ingest = from_environ(
        INGEST__ALLOWED_ORIGINS="https://Shop.example:443,http://localhost:5173,capacitor://localhost",
        INGEST__ALLOWED_HOSTS="Till-7.local,[fd00::1]",
    ).settings.ingest

    assert ingest.allowed_origins == (
        "https://shop.example",
        "http://localhost:5173",
        "capacitor://localhost",
    )
    assert ingest.allowed_hosts == ("till-7.local", "[fd00::1]")


# --- the write key ---


def test_a_bare_key_is_sent_as_bearer_and_one_with_a_scheme_as_it_is() -> None:
    bare, basic = WriteKey("abc"), WriteKey("Basic eHl6")

    assert (bare.authorization, bare.bare) == ("Bearer abc", "abc")
    assert (basic.authorization, basic.bare) == ("Basic eHl6", "eHl6")


def test_the_key_file_is_read_from_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"  {KEY}\n")

    loaded = from_text(tmp_path, '[upstream]\nwrite_key_file = "key"')

    assert loaded.settings.upstream.write_key == WriteKey(KEY)
    assert loaded.origins["upstream.write_key"] == str(tmp_path / "key")
    assert loaded.problems == ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read (No such file or directory); check the path and its permissions"),
        (b" \n", "the file is empty; put the write key into it"),
        (b"two\nlines", "a write key is one line of printable ASCII"),
        (b"\xff\xfe\x00", "a write key is one line of printable ASCII"),
        ("schlüssel".encode(), "a write key is one line of printable ASCII"),
    ],
)
def test_a_bad_key_file_is_a_problem_and_stops_nothing(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)

    loaded = from_text(tmp_path, '[upstream]\nurl = "https://a.example"\nwrite_key_file = "key"')

    assert loaded.settings.upstream.write_key is None
    (problem,) = loaded.problems
    assert problem.startswith(f'upstream.write_key_file = "{tmp_path / "key"}": {told}')
    assert loaded.missing() == problem


def test_a_key_that_no_header_can_carry_is_a_problem_that_does_not_quote_it() -> None:
    loaded = from_environ(UPSTREAM__WRITE_KEY=f"{KEY}\u2026")

    assert loaded.settings.upstream.write_key is None
    (problem,) = loaded.problems
    assert problem.startswith("upstream.write_key: a write key is one line of printable ASCII")
    assert KEY not in problem


def test_the_credential_is_used_when_no_key_is_configured(tmp_path: Path) -> None:
    (tmp_path / "write_key").write_text(f"{KEY}\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}

    loaded = load(None, environ, search=())
    configured = load(None, {**environ, "TRANTHOR_AGENT_UPSTREAM__WRITE_KEY": "mine"}, search=())

    assert loaded.settings.upstream.write_key == WriteKey(KEY)
    assert loaded.origins["upstream.write_key"] == "credential write_key"
    assert configured.settings.upstream.write_key == WriteKey("mine")


@pytest.mark.parametrize("content", [None, "\n"])
def test_an_absent_or_blank_credential_is_no_key_and_no_problem(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "write_key").write_text(content)

    loaded = load(None, {"CREDENTIALS_DIRECTORY": str(tmp_path)}, search=())

    assert loaded.settings.upstream.write_key is None
    assert loaded.origins["upstream.write_key"] == "default"
    assert loaded.problems == ()


def test_the_files_beside_a_configuration_are_read_anew_and_it_is_not(tmp_path: Path) -> None:
    key_file, config = tmp_path / "write_key", tmp_path / "config.toml"
    key_file.write_text("key-1")
    config.write_text('[upstream]\nurl = "https://a.example"\nwrite_key_file = "write_key"\n')
    loaded = load(config, {})
    key_file.write_text("key-2")
    config.write_text("[nonsense]")

    again = refresh(loaded, {})

    assert again.settings.upstream.write_key == WriteKey("key-2")
    assert again.settings.upstream.url == "https://a.example"
    assert files_beside(again, {}) == (key_file,)


def test_a_credential_that_comes_later_is_read_and_one_that_goes_is_none(tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    loaded = load(None, environ, search=())
    (tmp_path / "write_key").write_text("key-1")
    with_key = refresh(loaded, environ)
    (tmp_path / "write_key").write_text("\n")

    assert with_key.settings.upstream.write_key == WriteKey("key-1")
    assert refresh(with_key, environ).settings.upstream.write_key is None
    assert files_beside(loaded, environ) == (tmp_path / "write_key",)


def test_a_credential_does_not_stand_in_for_a_bad_key_of_the_configuration(tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    (tmp_path / "write_key").write_text("key-1")
    config = tmp_path / "config.toml"
    config.write_text('[upstream]\nurl = "https://a.example"\nwrite_key = "clé"\n')
    loaded = load(config, environ)

    assert loaded.missing()
    assert refresh(loaded, environ) == loaded


def test_a_credential_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "write_key").mkdir()

    (problem,) = load(None, {"CREDENTIALS_DIRECTORY": str(tmp_path)}, search=()).problems

    assert "systemd credential write_key): cannot be read (Is a directory)" in problem


def test_two_keys_are_a_fault_that_names_both_places(tmp_path: Path) -> None:
    message = fault(
        tmp_path,
        f'[upstream]\nwrite_key = "{KEY}"',
        {"TRANTHOR_AGENT_UPSTREAM__WRITE_KEY_FILE": "/key"},
    )

    assert (
        "write_key_file (environment TRANTHOR_AGENT_UPSTREAM__WRITE_KEY_FILE) are both set"
        in message
    )
    assert KEY not in message


def test_certificates_that_are_not_there_are_problems(tmp_path: Path) -> None:
    loaded = from_text(tmp_path, '[upstream]\nca_file = "ca.pem"\nclient_cert = "c.pem"')

    assert loaded.settings.upstream.ca_file == tmp_path / "ca.pem"
    assert [problem.partition(" = ")[0] for problem in loaded.problems] == [
        "upstream.ca_file",
        "upstream.client_cert",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "",
            "no upstream is configured: set upstream.url and upstream.write_key (or write_key_file)",
        ),
        ('[upstream]\nwrite_key = "k"', "no upstream is configured: set upstream.url in "),
        (
            '[upstream]\nurl = "https://a.example"',
            "no write key is configured: set upstream.write_key (or write_key_file) in ",
        ),
    ],
)
def test_what_is_missing_is_one_sentence_with_the_place(
    tmp_path: Path, text: str, told: str
) -> None:
    missing = from_text(tmp_path, text).missing()

    assert missing is not None
    assert missing.startswith(told)
    assert missing.endswith(f" in {tmp_path / 'config.toml'}")


def test_without_a_file_the_remedy_is_the_command_that_writes_one() -> None:
    missing = from_environ(UPSTREAM__URL="https://a.example").missing()

    assert missing is not None
    assert missing.endswith("; `tranthor-agent config init` writes a file")


def test_nothing_is_missing_with_url_and_key() -> None:
    loaded = from_environ(UPSTREAM__URL="https://a.example", UPSTREAM__WRITE_KEY=KEY)

    assert loaded.missing() is None


# --- what is shown ---


def test_effective_values_are_toml_with_their_origin_and_secrets_masked(tmp_path: Path) -> None:
    loaded = from_text(
        tmp_path,
        f'[upstream]\nwrite_key = "{KEY}"\nproxy = "http://me:{KEY}@proxy:3128"\ntimeout = "90s"\n'
        '[ingest]\nmax_body = "1024KiB"\nallowed_hosts = ["a", "b"]',
    )

    shown = {key.key: key.value for key in effective(loaded)}

    assert shown["upstream.write_key"] == f'"{MASK}"'
    assert shown["upstream.proxy"] == f'"http://{MASK}@proxy:3128"'
    assert shown["upstream.timeout"] == '"1m30s"'
    assert shown["ingest.max_body"] == '"1MiB"'
    assert shown["ingest.allowed_hosts"] == '["a", "b"]'
    assert shown["ingest.port"] == "7227"
    assert shown["outbox.max_age"] == '""'
    assert shown["upstream.ca_file"] == '""'
    origins = {key.key: key.origin for key in effective(loaded)}
    assert origins["upstream.timeout"] == str(tmp_path / "config.toml")


def test_no_rendering_of_the_settings_shows_a_secret() -> None:
    loaded = from_environ(UPSTREAM__WRITE_KEY=KEY, UPSTREAM__PROXY=f"http://me:{KEY}@proxy:3128")

    assert KEY not in f"{loaded} {loaded!r} {loaded.settings} {loaded.settings.upstream.write_key}"
    assert loaded.settings.upstream.proxy == f"http://me:{KEY}@proxy:3128"


@pytest.mark.parametrize(
    "text",
    [
        f'write_key = ["{KEY}"]',
        f'proxy = ["{KEY}"]',
        f'proxy = "socks5://me:{KEY}@proxy:1080"',
        f'proxy = "me:{KEY}@proxy"',
        f'url = "https://{KEY}@app.tranthor.com"',
        f'url = "https://app.tranthor.com/?writeKey={KEY}"',
        f"write_key = {KEY}",
    ],
)
def test_no_error_quotes_a_secret(tmp_path: Path, text: str) -> None:
    assert KEY not in fault(tmp_path, f"[upstream]\n{text}")


@given(
    st.text(string.ascii_letters + string.digits + "/:#?%", min_size=8),
    st.sampled_from(["", "http://", "socks5://"]),
)
def test_no_password_in_a_proxy_shows(password: str, scheme: str) -> None:
    secret = f"<{password}>"

    assert secret not in repr(ProxyUrl(f"{scheme}me:{secret}@proxy:3128"))


# --- units ---


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("500ms", 0.5),
        ("30s", 30),
        ("5m", 300),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        (" 7d ", 604_800),
        ("1.5h", 5400),
        ("1d2h3m4s5ms", 93_784.005),
    ],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert Seconds.parse(text) == seconds


@pytest.mark.parametrize(
    "value",
    ["", " ", "s", "30", "-1s", "1S", "1w", "30m1h", "5m3m", "0.1ms", "1e3s", 30, 1.5, True],
)
def test_what_is_no_duration_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        Seconds.parse(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0B", 0), ("1KB", 1000), ("1KiB", 1024), ("5 MiB", 5_242_880), ("1.5GiB", 1_610_612_736)],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert Bytes.parse(text) == size


@pytest.mark.parametrize("value", ["", "5", "5mib", "5M", "-1B", "0.5B", "1MiB1KiB", 5, 0.5, False])
def test_what_is_no_size_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match="size"):
        Bytes.parse(value)


@given(st.integers(min_value=0, max_value=10**14))
def test_every_duration_survives_being_written(wait_ms: int) -> None:
    wait = Seconds(wait_ms / 1000)

    assert Seconds.parse(wait.text) == wait


@given(st.integers(min_value=0, max_value=10**11) | st.integers(0, 10**5).map(lambda n: n * 2**20))
def test_every_size_survives_being_written(size: int) -> None:
    assert Bytes.parse(Bytes(size).text) == size


@given(st.text(max_size=12) | st.from_regex(r"[0-9. ]{1,4}(ms|s|m|h|d|B|KB|GiB)", fullmatch=True))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for unit in (Seconds, Bytes):
        with suppress(ValueError):
            assert unit.parse(text) >= 0


@given(st.sampled_from(sorted(KEYS)), st.text(max_size=12))
def test_any_text_for_any_key_is_a_value_or_one_line(key: str, text: str) -> None:
    assert len(told_of({key: text}).splitlines()) <= 1


@given(st.text(max_size=8))
def test_any_unknown_variable_is_one_line(name: str) -> None:
    assert len(told_of({f"LOG__X{name}": ""}).splitlines()) == 1


def test_upstream_alone_can_be_made_for_tests() -> None:
    assert Upstream(url="http://127.0.0.1:1", write_key=WriteKey("k")).timeout == 30.0


def test_beside_the_system_file_the_outbox_is_the_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("", encoding="utf-8")
    monkeypatch.setattr("agent.config.places.SYSTEM_FILE", file)

    assert str(load(file, {}).settings.outbox.path) == "/var/lib/tranthor-agent/outbox.db"


def test_a_bad_key_of_a_named_upstream_is_still_told_after_the_files_were_read_anew(
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[upstreams.crm]\nurl = "https://a.example"\nwrite_key = "clé"\n'
        '[upstream]\nurl = "https://b.example"\nwrite_key_file = "key"\n'
    )
    (tmp_path / "key").write_text("key-1")
    loaded = load(config, {})
    (tmp_path / "key").write_text("key-2")
    anew = refresh(loaded, {})

    assert anew.settings.upstream.write_key == WriteKey("key-2")
    assert anew.problems == loaded.problems
    assert "printable ASCII" in (anew.missing("crm") or "")
