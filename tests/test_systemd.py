"""What the service manager hears and hands over, and that it accepts our unit."""

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from agent.errors import ConfigError
from agent.systemd import Notifier, WatchdogGate, inherited_sockets, watchdog_interval_s

UNIT = Path(__file__).parent.parent / "systemd" / "tranthor-agent.service"
SYSUSERS = UNIT.with_suffix(".sysusers")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(5)
        yield end


def _notifier(manager: socket.socket) -> Notifier:
    return Notifier.from_environ({"NOTIFY_SOCKET": manager.getsockname()})


def _heard(manager: socket.socket) -> list[str]:
    return manager.recv(65536).decode().split("\n")


@contextmanager
def _at_most(limit_s: float) -> Iterator[None]:
    """Fail, even inside a system call, when the body takes longer than *limit_s*."""

    def interrupt(*_: object) -> None:
        raise AssertionError(f"blocked for {limit_s} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _fill_queue(manager: socket.socket) -> int:
    """Make the manager deaf; return how many messages it takes to make it hear again."""
    sent = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        while True:
            try:
                other.sendto(b"X=1", manager.getsockname())
            except BlockingIOError:
                return sent
            sent += 1


# --- notify -------------------------------------------------------------------------------------


def test_ready_says_that_startup_is_over_and_how_things_stand(manager: socket.socket) -> None:
    _notifier(manager).ready("flowing")

    assert _heard(manager) == ["READY=1", "STATUS=flowing"]


def test_status_stopping_and_watchdog_are_one_message_each(manager: socket.socket) -> None:
    notifier = _notifier(manager)

    notifier.status("12 pending")
    notifier.watchdog()
    notifier.stopping("closing")

    assert _heard(manager) == ["STATUS=12 pending"]
    assert _heard(manager) == ["WATCHDOG=1"]
    assert _heard(manager) == ["STOPPING=1", "STATUS=closing"]


def test_a_reload_begins_at_an_instant_and_ends_with_ready(manager: socket.socket) -> None:
    notifier = _notifier(manager)

    notifier.reloading(12.345678)
    notifier.ready("flowing")

    assert _heard(manager) == ["RELOADING=1", "MONOTONIC_USEC=12345678"]
    assert _heard(manager) == ["READY=1", "STATUS=flowing"]


def test_a_reload_that_was_not_heard_of_does_not_seem_to_begin_when_it_is_over(
    manager: socket.socket,
) -> None:
    notifier = _notifier(manager)
    queued = _fill_queue(manager)

    notifier.reloading(12.0)
    for _ in range(queued):
        manager.recv(16)
    notifier.ready("flowing")

    assert _heard(manager) == ["READY=1", "STATUS=flowing"]


def test_a_line_break_in_a_status_adds_no_assignment(manager: socket.socket) -> None:
    _notifier(manager).status("held: 403\nMAINPID=1\r\nX=1")

    assert _heard(manager) == ["STATUS=held: 403 MAINPID=1 X=1"]


def test_a_status_that_is_no_valid_unicode_is_still_sent(manager: socket.socket) -> None:
    _notifier(manager).status("bad \ud800 half")

    assert _heard(manager) == ["STATUS=bad ? half"]


def test_an_abstract_address_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # the kernel picks an abstract name
        manager.settimeout(5)
        name = manager.getsockname()[1:].decode()

        Notifier.from_environ({"NOTIFY_SOCKET": "@" + name}).status("here")

        assert _heard(manager) == ["STATUS=here"]


def test_outside_systemd_nothing_is_sent_and_nothing_is_logged() -> None:
    with structlog.testing.capture_logs() as lines:
        notifier = Notifier.from_environ({})
        notifier.ready("flowing")
        notifier.watchdog()

    assert lines == []


def test_children_do_not_inherit_the_address(manager: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": manager.getsockname(), "HOME": "/"}

    Notifier.from_environ(environ)

    assert environ == {"HOME": "/"}


def test_a_manager_that_is_gone_is_logged_once_and_raises_nothing(tmp_path: Path) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": str(tmp_path / "gone")})

    with structlog.testing.capture_logs() as lines:
        notifier.ready("flowing")
        notifier.status("flowing")
        notifier.watchdog()

    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("systemd.notification_delayed", "warning")
    ]


def test_a_deaf_manager_does_not_block_and_hears_ready_with_the_next_message(
    manager: socket.socket,
) -> None:
    notifier = _notifier(manager)
    queued = _fill_queue(manager)

    with _at_most(0.5):
        notifier.ready("starting")
        notifier.status("flowing")
    for _ in range(queued):
        manager.recv(16)
    notifier.watchdog()
    notifier.watchdog()

    assert _heard(manager) == ["READY=1", "STATUS=flowing", "WATCHDOG=1"]
    assert _heard(manager) == ["WATCHDOG=1"]


def test_a_lost_watchdog_message_is_not_sent_later(manager: socket.socket) -> None:
    notifier = _notifier(manager)
    queued = _fill_queue(manager)

    with _at_most(0.5):
        notifier.watchdog()
    for _ in range(queued):
        manager.recv(16)
    notifier.status("flowing")

    assert _heard(manager) == ["STATUS=flowing"]


# --- watchdog -----------------------------------------------------------------------------------


def test_the_watchdog_is_fed_at_half_its_interval() -> None:
    environ = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}

    assert watchdog_interval_s(environ, 42) == 15.0


def test_without_a_watchdog_pid_the_watchdog_is_ours() -> None:
    assert watchdog_interval_s({"WATCHDOG_USEC": "1000000"}, 42) == 0.5


def test_no_watchdog_or_that_of_another_process_is_not_fed() -> None:
    assert watchdog_interval_s({}, 42) is None
    assert watchdog_interval_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "41"}, 42) is None


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1.5", "٣"])
def test_a_watchdog_interval_that_is_no_positive_number_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="WATCHDOG_USEC"):
        watchdog_interval_s({"WATCHDOG_USEC": value}, 42)


def test_a_party_with_work_and_no_beat_is_stalled() -> None:
    gate = WatchdogGate(stall_s=20)
    gate.busy("writer", 100.0)

    assert gate.stalled(120.0) is None
    assert gate.stalled(120.1) == "writer"


def test_a_beat_is_progress() -> None:
    gate = WatchdogGate(stall_s=20)
    gate.busy("writer", 100.0)
    gate.beat("writer", 119.0)

    assert gate.stalled(139.0) is None
    assert gate.stalled(139.1) == "writer"


def test_more_work_is_not_progress() -> None:
    gate = WatchdogGate(stall_s=20)
    gate.busy("writer", 100.0)
    gate.busy("writer", 119.0)

    assert gate.stalled(121.0) == "writer"


def test_an_idle_party_may_stay_silent() -> None:
    gate = WatchdogGate(stall_s=20)
    gate.busy("forwarder", 100.0)
    gate.idle("forwarder")
    gate.beat("forwarder", 101.0)
    gate.idle("writer")

    assert gate.stalled(10_000.0) is None


def test_new_work_after_idling_starts_a_new_wait() -> None:
    gate = WatchdogGate(stall_s=20)
    gate.busy("forwarder", 100.0)
    gate.idle("forwarder")
    gate.busy("forwarder", 500.0)

    assert gate.stalled(520.0) is None


def test_one_party_cannot_cover_for_another() -> None:
    gate = WatchdogGate(stall_s=20)
    gate.busy("writer", 100.0)
    gate.busy("forwarder", 99.0)
    gate.beat("loop", 130.0)
    gate.beat("forwarder", 130.0)

    assert gate.stalled(130.0) == "writer"


# --- inherited sockets --------------------------------------------------------------------------


def _in_child(script: str) -> str:
    """Run *script* where descriptor 3 is free for it; return what it printed."""
    prelude = (
        "import os, socket\n"
        "from agent.errors import ConfigError\n"
        "from agent.systemd import inherited_sockets\n"
        "environ = {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDNAMES': 'x', 'HOME': '/'}\n"
    )
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + script],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=UNIT.parent.parent,
    )
    assert (child.returncode, child.stderr) == (0, "")
    return child.stdout.strip()


def test_inherited_sockets_are_adopted_in_order_and_closed_on_exec() -> None:
    out = _in_child(
        "tcp = socket.create_server(('127.0.0.1', 0))\n"
        "unix = socket.socket(socket.AF_UNIX); unix.bind(''); unix.listen()\n"
        "tcp_fd, unix_fd = os.dup(tcp.fileno()), os.dup(unix.fileno())\n"
        "tcp.close(); unix.close()\n"
        "os.dup2(tcp_fd, 13); os.dup2(unix_fd, 14)\n"
        "os.dup2(13, 3); os.dup2(14, 4)\n"
        "got = inherited_sockets(environ | {'LISTEN_FDS': '2'}, os.getpid())\n"
        "print([(s.family.name, s.fileno(), s.get_inheritable()) for s in got])\n"
        "[s.close() for s in got]\n"
    )

    assert out == "[('AF_INET', 3, False), ('AF_UNIX', 4, False)]"


@pytest.mark.parametrize(
    "make",
    [
        "os.dup2(os.open('/dev/null', os.O_RDONLY), 3)",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); os.dup2(os.dup(s.fileno()), 3)",
        "s = socket.socket(); os.dup2(os.dup(s.fileno()), 3)",
    ],
    ids=["a file", "a datagram socket", "a socket that does not listen"],
)
def test_anything_but_a_listening_stream_socket_is_refused(make: str) -> None:
    out = _in_child(
        f"{make}\n"
        "try:\n    inherited_sockets(environ | {'LISTEN_FDS': '1'}, os.getpid())\n"
        "except ConfigError as exc:\n    print(exc)\n"
        "if 's' in globals() and s.fileno() != 3: s.close()\n"
        "elif 's' in globals(): s.detach()\n"
    )

    assert out.startswith("inherited descriptor 3 is not a")


def test_sockets_of_another_process_are_left_alone_and_forgotten() -> None:
    environ = {"LISTEN_PID": "41", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}

    assert inherited_sockets(environ, 42) == []
    assert environ == {"HOME": "/"}


def test_without_socket_activation_there_are_no_sockets() -> None:
    assert inherited_sockets({}, 42) == []


def test_a_count_of_sockets_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="LISTEN_FDS"):
        inherited_sockets({"LISTEN_PID": "42", "LISTEN_FDS": "many"}, 42)


# --- the unit -----------------------------------------------------------------------------------


def _analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    binary = shutil.which("systemd-analyze")
    if binary is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(
        [binary, *arguments], check=False, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Our unit with a program that exists here: `verify` looks for it."""
    lines = [
        f"ExecStart={shutil.which('true')}" if line.startswith("ExecStart=") else line
        for line in UNIT.read_text().splitlines()
    ]
    copy = tmp_path / UNIT.name
    copy.write_text("\n".join(lines) + "\n")
    return copy


def test_systemd_accepts_every_line_of_the_unit(unit: Path) -> None:
    result = _analyze("verify", unit)

    # An unknown or malformed line is a complaint, not a failure.
    ours = [line for line in result.stderr.splitlines() if unit.stem in line]
    assert (result.returncode, ours) == (0, [])


def test_the_unit_is_hardened(unit: Path) -> None:
    result = _analyze("security", "--offline=true", "--threshold=30", "--no-pager", unit)
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze knows no --offline")

    assert result.returncode == 0, result.stdout  # exposure above 3.0 is an error


def test_a_machine_without_a_key_still_starts_and_without_a_network_too() -> None:
    lines = UNIT.read_text().splitlines()

    for key in ("write_key", "redact_key"):
        assert f"LoadCredential={key}:/etc/tranthor-agent/{key}" in lines
        assert rf"SetCredential={key}:\n" in lines  # the default while the file is missing
    assert not [line for line in lines if "network-online" in line and not line.startswith("#")]


def test_the_unit_names_the_user_that_sysusers_creates(tmp_path: Path) -> None:
    binary = shutil.which("systemd-sysusers")
    if binary is None:
        pytest.skip("systemd-sysusers is not installed")
    (tmp_path / "etc").mkdir()

    result = subprocess.run(
        [binary, f"--root={tmp_path}", SYSUSERS],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert result.returncode == 0, result.stderr
    name, _, _, _, _, home, _ = (tmp_path / "etc" / "passwd").read_text().strip().split(":")
    assert f"User={name}" in UNIT.read_text().splitlines()
    assert home == "/var/lib/tranthor-agent"
