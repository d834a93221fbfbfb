"""The service: what the unit promises, under a real systemd, installed as the README says.

    TRANTHOR_TEST_SYSTEMD_ROOT=/var/tmp/bookworm .venv/bin/python -m pytest tests/test_service.py

as root, where `systemd-nspawn` is (Debian: systemd-container). What that folder lacks is made once,
with a network: a minimal Debian by debootstrap, and our dependencies by pip. The tests boot it under
an overlay, so that they leave it as it was, and with no network but a loopback of its own.

The first tests put a socket in systemd's place and run everywhere.

Planted bugs that these were seen to find: READY=1 before the port listens, a forwarder that waits
out a silent upstream at the stop, and a unit without SetCredential=, LoadCredential=, Restart=,
PYTHONFAULTHANDLER=, StateDirectory=, or StateDirectoryMode= and UMask=.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import DEADLINE_S, free_port

REPOSITORY = Path(__file__).parent.parent
ROOT_VARIABLE = "TRANTHOR_TEST_SYSTEMD_ROOT"

KEY = "wk_service_test"
USER = "tranthor-agent"
COMMAND = "/opt/tranthor-agent/bin/tranthor-agent"
STATE = "/var/lib/tranthor-agent"
KILL = f"systemctl kill --signal=KILL {USER}"

HOST = "app.tranthor.test"
CONFIG = f"""\
[upstream]
url = "https://{HOST}"

[forward]
backoff_base = "100ms"
backoff_max = "200ms"
"""

_POLL_S = 0.05

pytestmark = pytest.mark.process


def until(condition: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    """Return when *condition* holds, in a process that cannot signal us."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never so\n{explain()}"
        time.sleep(_POLL_S)


# --- with a socket in systemd's place -----------------------------------------------------------


class Unit:
    """The daemon, started with what systemd would give it."""

    def __init__(self, folder: Path, manager: socket.socket, key: str | None) -> None:
        self.port = free_port()
        self.state = folder / "state"
        self.said: list[dict[str, str]] = []
        self._manager = manager
        self._log = folder / "journal"
        credentials = folder / "credentials"
        credentials.mkdir()
        if key is not None:
            (credentials / "write_key").write_text(key)
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "NOTIFY_SOCKET": manager.getsockname(),
            "WATCHDOG_USEC": "200000",
            "STATE_DIRECTORY": str(self.state),
            "CREDENTIALS_DIRECTORY": str(credentials),
            "TRANTHOR_AGENT_INGEST__PORT": str(self.port),
            # Nobody listens there: events wait.
            "TRANTHOR_AGENT_UPSTREAM__URL": f"http://127.0.0.1:{free_port()}",
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run"], cwd=REPOSITORY, env=environ, stderr=log
            )

    def hear(self, name: str) -> str:
        """Return the value of the next assignment to *name*; keep all that was heard in *said*."""
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s:
            try:
                message = self._manager.recv(65536).decode()
            except TimeoutError:
                break
            self.said.append(dict(line.split("=", 1) for line in message.split("\n")))
            if name in self.said[-1]:
                return self.said[-1][name]
        raise AssertionError(f"{name} was never said: {self.said}\n{self._log.read_text()}")

    def ask(self, path: str, body: object = None) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            return response.status, response.read()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]


StartUnit = Callable[[str | None], Unit]


@pytest.fixture
def start_unit(tmp_path: Path) -> Iterator[StartUnit]:
    units: list[Unit] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_S)

        def start(key: str | None) -> Unit:
            units.append(Unit(tmp_path, manager, key))
            return units[-1]

        yield start
        for unit in units:
            unit.process.kill()
            unit.process.wait(DEADLINE_S)


def event(message_id: str) -> dict[str, object]:
    return {"messageId": message_id, "event": "Item Sold", "userId": "u-1", "properties": {}}


def test_readiness_is_said_once_events_are_accepted(start_unit: StartUnit) -> None:
    unit = start_unit(KEY)

    unit.hear("READY")

    assert unit.ask("api/public/apps/track", event("m-1"))[0] == 204
    assert unit.said[-1]["STATUS"].startswith("flowing: 0 pending")


def test_the_watchdog_is_fed_and_the_stop_is_announced(start_unit: StartUnit) -> None:
    unit = start_unit(KEY)
    unit.hear("READY")

    unit.hear("WATCHDOG")
    unit.process.send_signal(signal.SIGTERM)
    unit.hear("STOPPING")

    assert unit.process.wait(DEADLINE_S) == 0
    assert [line["event"] for line in unit.log()][-1] == "agent.stopped"


def test_a_reload_is_announced_and_its_end_too(start_unit: StartUnit) -> None:
    unit = start_unit(KEY)
    unit.hear("READY")

    unit.process.send_signal(signal.SIGHUP)
    unit.hear("RELOADING")
    assert int(unit.said[-1]["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    unit.hear("READY")

    assert [line["event"] for line in unit.log()][-1] == "config.reloaded"


@pytest.mark.parametrize("key", [None, "", "\n"], ids=["no file", "an empty file", "a blank line"])
def test_without_a_key_it_is_ready_and_says_what_is_missing(
    start_unit: StartUnit, key: str | None
) -> None:
    unit = start_unit(key)

    unit.hear("READY")

    assert "no write key is configured" in unit.said[-1]["STATUS"]
    assert unit.ask("api/public/apps/track", event("m-1"))[0] == 204


def test_the_outbox_is_in_the_state_directory_for_the_user_and_its_group(
    start_unit: StartUnit,
) -> None:
    unit = start_unit(KEY)
    unit.hear("READY")
    unit.ask("api/public/apps/track", event("m-1"))

    files = {path.name: path.stat().st_mode & 0o777 for path in unit.state.iterdir()}

    assert unit.state.stat().st_mode & 0o777 == 0o750
    assert "outbox.db" in files
    assert set(files.values()) == {0o640}


# --- a machine with systemd ---------------------------------------------------------------------

UPSTREAM = '''
"""An upstream and the name server that knows it. It stores what comes with the key; or stays silent."""
import json, socketserver, ssl, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print(body["messageId"], self.headers["Authorization"], flush=True)
        if "silent" in sys.argv:
            threading.Event().wait()
        self.send_response(204)
        self.end_headers()
    def log_message(self, *_):
        pass

class Name(socketserver.DatagramRequestHandler):
    def handle(self):
        query = self.rfile.read()
        end = query.index(0, 12) + 5
        found = query[end - 4 : end - 2] == bytes([0, 1])  # RFC 1035: type A
        answer = bytes([192, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1]) if found else b""
        counts = bytes([129, 128, 0, 1, 0, found, 0, 0, 0, 0])
        self.wfile.write(query[:2] + counts + query[12:end] + answer)

tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
tls.load_cert_chain("/run/upstream.crt", "/run/upstream.key")
api = ThreadingHTTPServer(("127.0.0.1", 443), Api)
api.socket = tls.wrap_socket(api.socket, server_side=True)
threading.Thread(target=api.serve_forever, daemon=True).start()
socketserver.UDPServer(("127.0.0.1", 53), Name).serve_forever()
'''

TRUST_THE_UPSTREAM = f"""
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={HOST} -addext subjectAltName=DNS:{HOST} \
    -keyout /run/upstream.key -out /run/upstream.crt 2>/dev/null
cp /run/upstream.crt /usr/local/share/ca-certificates/
update-ca-certificates >/dev/null
rm -f /etc/resolv.conf
echo nameserver 127.0.0.1 >/etc/resolv.conf
cat >/run/upstream.py
"""

FRESH = f"""
systemctl stop upstream {USER} 2>/dev/null
rm -rf /etc/systemd/system/{USER}.service.d {STATE}/*
systemctl daemon-reload
systemctl reset-failed
install -d -m 750 -g {USER} /etc/{USER}
install -m 640 -g {USER} /dev/stdin /etc/{USER}/config.toml
printf '{KEY}\\n' | install -m 600 /dev/stdin /etc/{USER}/write_key
# Not by --after-cursor=, which in systemd 252 also skips the first line that a filter lets through.
journalctl --quiet --rotate --vacuum-time=1us
"""


class Machine:
    """A booted container. *leader_pid* is its process 1, as this machine counts."""

    def __init__(self, leader_pid: int) -> None:
        self._enter = ["nsenter", "--target", str(leader_pid), "--all", "env", "-i"]
        self._enter += ["LANG=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]

    def run(self, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._enter, *command],
            input=given,
            check=False,
            capture_output=True,
            text=True,
            timeout=4 * DEADLINE_S,
        )

    def sh(self, script: str, given: str = "") -> str:
        """Run *script*, which must succeed; return what it printed."""
        done = self.run("bash", "-c", script, given=given)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}{self.journal()}"
        return done.stdout.strip()

    def refresh(self, config: str = CONFIG) -> None:
        """Make the service as if newly installed: stopped, an empty outbox, *config* and a key."""
        self.sh(FRESH, given=config)

    def override(self, line: str) -> None:
        """Do what `systemctl edit` does."""
        folder = f"/etc/systemd/system/{USER}.service.d"
        self.sh(f"mkdir -p {folder} && cat >{folder}/test.conf", given=f"[Service]\n{line}\n")
        self.sh("systemctl daemon-reload")

    def start(self) -> None:
        self.sh(f"systemctl start {USER}")

    def show(self, name: str) -> str:
        return self.sh(f"systemctl show --property={name} --value {USER}")

    @property
    def pid(self) -> str:
        return self.show("MainPID")

    def until_restarted(self) -> None:
        until(lambda: self.show("NRestarts") == "1", self.journal)
        until(lambda: self.show("ActiveState") == "active", self.journal)

    def post(self, message_id: str, options: str = "") -> int:
        """Post an event as an app would, once; return the answer's status, 0 for none."""
        body = json.dumps(event(message_id))
        write = "--silent --output /dev/null --write-out %{http_code} --json @-"
        url = "http://127.0.0.1:7227/api/public/apps/track"
        done = self.run("bash", "-c", f"curl {write} {options} {url}", given=body)
        return int(done.stdout)

    def status(self, user: str = "root") -> tuple[int, dict[str, Any]]:
        """Return what `status` exits with and prints, to *user*."""
        done = self.run("runuser", "-u", user, "--", COMMAND, "status", "--json")
        assert done.stdout, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return done.returncode, answer

    def list_ids(self, user: str) -> list[str]:
        listed = self.sh(f"runuser -u {user} -- {COMMAND} list --json")
        return [json.loads(line)["messageId"] for line in listed.splitlines()]

    def files(self) -> dict[str, str]:
        """Return owner, group and mode of everything in the state directory, itself included."""
        listed = self.sh(f"find {STATE} -printf '%f=%u:%g:%m\n'")
        return dict(line.split("=") for line in listed.splitlines())

    def serve_upstream(self, argument: str = "") -> None:
        output = "--property=StandardOutput=truncate:/run/upstream.log"
        self.sh(
            f"systemd-run --quiet --collect --unit=upstream {output}"
            f" /usr/bin/python3 /run/upstream.py {argument}"
        )

    def arrived(self) -> list[str]:
        """Return "messageId authorization" of each request to the upstream."""
        return self.sh("cat /run/upstream.log 2>/dev/null || true").splitlines()

    def journal(self, *filters: str) -> str:
        """Return what service and systemd have said since the last `refresh`."""
        return self.run("journalctl", "--quiet", "--output=cat", f"--unit={USER}", *filters).stdout


def _call(*command: str | Path) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def _make_root(root: Path) -> None:
    """Make what *root* lacks. Needs a network."""
    if not (root / "usr/lib/systemd/systemd").exists():
        packages = "systemd,systemd-sysv,dbus,python3,python3-venv,ca-certificates,openssl,curl"
        _call("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root)
    # The machine's own authorities: there may be a proxy with a certificate of its own on the way.
    authorities = "/etc/ssl/certs/ca-certificates.crt"
    _call(
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--directory={root}"),
        *(f"--bind-ro={REPOSITORY}:/clone", f"--bind-ro={authorities}:/run/authorities.crt"),
        *("--setenv=PIP_CERT=/run/authorities.crt", "--chdir=/clone", "bash", "-ec"),
        "python3 -m venv /opt/tranthor-agent\n"
        "/opt/tranthor-agent/bin/pip install --require-hashes -r requirements.txt",
    )


@contextmanager
def _booted(root: Path, folder: Path) -> Iterator[Machine]:
    """Boot *root* while the block runs. One at a time: they would share a control group."""
    log = folder / "machine.log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, log.open("wb") as output:
        ready.bind(str(folder / "notify"))
        ready.settimeout(4 * DEADLINE_S)
        nspawn = subprocess.Popen(
            [
                *("systemd-nspawn", "--quiet", "--boot", "--notify-ready=yes"),
                *(f"--directory={root}", "--volatile=overlay", f"--bind-ro={REPOSITORY}:/clone"),
                *("--register=no", "--keep-unit", f"--machine=tranthor-{os.getpid()}"),
                *("--private-network", "--resolv-conf=off", "--console=pipe"),
            ],
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        # The socket is closed here: nspawn would hang, deaf to SIGTERM, once nobody empties it.
        leader_pid = _leader_pid(ready, log)
    try:
        yield Machine(leader_pid)
    finally:
        nspawn.terminate()  # it asks the container's systemd to power off
        try:
            nspawn.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            os.kill(leader_pid, signal.SIGKILL)  # and with it all that runs in the container
            nspawn.wait(DEADLINE_S)


def _leader_pid(ready: socket.socket, log: Path) -> int:
    """Wait until the container has booted; return its process 1, as seen from outside.

    Source: systemd-nspawn(1), --notify-ready=.
    """
    leader_pid = 0
    while True:
        try:
            message = ready.recv(65536).decode()
        except TimeoutError:
            raise AssertionError(f"the container did not boot:\n{log.read_text()}") from None
        if found := re.search(r"^X_NSPAWN_LEADER_PID=(\d+)$", message, re.MULTILINE):
            leader_pid = int(found[1])
        if "READY=1" in message.split("\n"):
            return leader_pid


def _readme_commands() -> str:
    readme = (REPOSITORY / "README.md").read_text()
    (block,) = re.findall(
        r"^## As a service$.*?^```sh$(.*?)^```$", readme, re.DOTALL | re.MULTILINE
    )
    return str(block)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which somebody did what the README says, and added a few people."""
    named = os.environ.get(ROOT_VARIABLE)
    if not named:
        pytest.skip(f"set {ROOT_VARIABLE} to a folder for a Debian that may be booted")
    if os.geteuid() != 0:
        pytest.skip("only root can boot a container")
    tools = ["systemd-nspawn", "nsenter", "debootstrap"]
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    root = Path(named)
    if not (root / "opt/tranthor-agent/bin/pip").exists():
        _make_root(root)
    with _booted(root, tmp_path_factory.mktemp("machine")) as machine:
        machine.sh(f"cd /clone && set -e\n{_readme_commands()}", given=f"{KEY}\n")
        machine.sh(f"useradd -G {USER} olga && useradd stranger")
        machine.sh(TRUST_THE_UPSTREAM, given=UPSTREAM)
        yield machine


@pytest.fixture
def machine(installed: Machine) -> Machine:
    installed.refresh()
    return installed


def test_started_means_that_events_are_accepted_even_without_a_network(machine: Machine) -> None:
    machine.start()

    assert machine.post("m-1") == 204
    assert machine.show("ActiveState") == "active"
    assert machine.sh(f"systemctl is-enabled {USER}") == "enabled"
    shown = machine.sh(f"systemctl status {USER}")
    assert 'Status: "flowing: 0 pending, 0 delivered, 0 dead"' in shown


def test_it_runs_as_its_user_without_any_privilege(machine: Machine) -> None:
    machine.start()

    lines = machine.sh(f"cat /proc/{machine.pid}/status").splitlines()
    process = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    uid, gid = machine.sh(f"id -u {USER}; id -g {USER}").split()
    assert process["Uid"].split() == [uid] * 4
    assert process["Gid"].split() == [gid] * 4
    assert process["Groups"] == gid
    assert {process[f"Cap{kind}"].strip("0") for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {
        ""
    }
    assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")


def test_its_files_are_for_the_user_and_its_group(machine: Machine) -> None:
    machine.start()
    machine.post("m-1")

    files = machine.files()

    assert files.pop(USER) == f"{USER}:{USER}:750"
    beside = ("-wal", "-shm", "-tally", ".lock", ".reserve")
    assert set(files) == {"outbox.db", *(f"outbox.db{suffix}" for suffix in beside)}
    assert set(files.values()) == {f"{USER}:{USER}:640"}


def test_the_credential_is_what_opens_the_upstream(machine: Machine) -> None:
    machine.serve_upstream()
    machine.start()

    machine.post("m-1")

    # By a name that DNS resolves, and a certificate that the system trusts.
    until(lambda: machine.arrived() == [f"m-1 Bearer {KEY}"], machine.journal)
    until(lambda: machine.status()[1]["delivered"] == 1, machine.journal)
    assert machine.sh("stat -c %U:%a /etc/tranthor-agent/write_key") == "root:600"
    assert KEY not in machine.sh(f"tr '\\0' ' ' </proc/{machine.pid}/environ")
    assert KEY not in machine.sh(f"tr '\\0' ' ' </proc/{machine.pid}/cmdline")
    assert KEY not in machine.journal()


@pytest.mark.parametrize(
    "take_away",
    [
        "rm /etc/tranthor-agent/write_key",
        "truncate -s 0 /etc/tranthor-agent/write_key",
        "rm -r /etc/tranthor-agent",
    ],
    ids=["no key", "an empty key", "nothing configured"],
)
def test_without_a_key_it_stores_events_and_says_what_is_missing(
    machine: Machine, take_away: str
) -> None:
    machine.sh(take_away)

    machine.start()

    assert machine.post("m-1") == 204
    assert machine.show("StatusText").startswith("unconfigured: ")
    assert "write_key" in machine.show("StatusText")


def test_what_was_accepted_without_a_network_is_delivered_once_there_is_one(
    machine: Machine,
) -> None:
    machine.start()
    machine.post("m-1")
    until(lambda: machine.status()[1]["state"] == "backing_off", machine.journal)
    assert "name" in machine.status()[1]["reason"]

    machine.serve_upstream()

    until(lambda: machine.arrived() == [f"m-1 Bearer {KEY}"], machine.journal)


def test_killed_it_comes_back_with_every_event(machine: Machine) -> None:
    machine.start()
    machine.post("m-1")

    machine.sh(KILL)
    machine.until_restarted()

    assert machine.list_ids("root") == ["m-1"]
    assert machine.post("m-2") == 204


def test_a_hang_is_ended_and_the_journal_says_where_it_was(machine: Machine) -> None:
    machine.override("WatchdogSec=2s")
    machine.start()
    machine.post("m-1")

    machine.sh(f"kill -STOP {machine.pid}")
    machine.until_restarted()

    assert f"{USER}.service: Failed with result 'watchdog'." in machine.journal()
    assert "most recent call first" in machine.journal()
    assert machine.list_ids("root") == ["m-1"]


def test_a_stop_is_short_and_clean_while_the_upstream_is_silent(machine: Machine) -> None:
    machine.serve_upstream("silent")
    machine.start()
    machine.post("m-1")
    until(lambda: bool(machine.arrived()), machine.journal)

    began_s = time.monotonic()
    machine.sh(f"systemctl stop {USER}")

    assert time.monotonic() - began_s < 10  # what the unit's TimeoutStopSec= relies on
    assert (machine.show("Result"), machine.show("ExecMainStatus")) == ("success", "0")
    assert machine.list_ids("root") == ["m-1"]


@pytest.mark.parametrize("user", ["root", "olga"])
@pytest.mark.parametrize(
    ("end", "exit_code"),
    [("true", 0), (f"systemctl stop {USER}", 2), (f"{KILL}; systemctl stop {USER}", 2)],
    ids=["running", "stopped", "killed"],
)
def test_looking_in_works_in_every_state_and_leaves_nothing_behind(
    machine: Machine, user: str, end: str, exit_code: int
) -> None:
    machine.serve_upstream("silent")  # status is then: flowing
    machine.start()
    machine.post("m-1")
    machine.sh(end)
    before = machine.files()

    status = machine.status(user)

    assert (status[0], status[1]["accepted"]) == (exit_code, 1)
    assert machine.list_ids(user) == ["m-1"]
    assert machine.files() == before
    machine.start()
    assert machine.post("m-2") == 204


def test_what_root_changes_between_runs_stays_the_services_own(machine: Machine) -> None:
    machine.start()
    machine.post("m-1")
    machine.sh(f"{KILL}; systemctl stop {USER}")  # with a log to recover

    machine.sh(f"{COMMAND} pause")
    machine.start()

    assert machine.post("m-2") == 204
    assert machine.status()[1]["state"] == "paused"
    assert {owner.rpartition(":")[0] for owner in machine.files().values()} == {f"{USER}:{USER}"}


def test_strangers_may_post_but_not_look_in(machine: Machine) -> None:
    machine.start()

    done = machine.run("runuser", "-u", "stranger", "--", COMMAND, "list")

    assert done.returncode != 0
    assert "Permission denied" in done.stderr
    assert machine.run("runuser", "-u", "stranger", "--", "ls", STATE).returncode != 0


def test_a_unix_socket_in_the_runtime_directory_is_for_the_group(machine: Machine) -> None:
    path = f"/run/{USER}/ingest.sock"
    machine.refresh(f'[ingest]\nunix_socket = "{path}"\n{CONFIG}')
    machine.start()

    assert machine.sh(f"stat -c %U:%G:%a {path}") == f"{USER}:{USER}:660"
    assert machine.post("m-1", f"--unix-socket {path}") == 204


def test_every_line_of_the_service_in_the_journal_is_json(machine: Machine) -> None:
    machine.start()
    machine.post("m-1")
    until(lambda: machine.status()[1]["state"] == "backing_off", machine.journal)
    machine.sh(f"systemctl stop {USER}")

    lines = machine.journal("_TRANSPORT=stdout").splitlines()  # systemd's own are "journal"

    events = [json.loads(line)["event"] for line in lines]
    assert (events[0], events[-1]) == ("agent.started", "agent.stopped")


def test_a_mended_configuration_needs_no_restart_by_hand(machine: Machine) -> None:
    machine.sh(f"printf '[upstream]\\nurll = 1\\n' >/etc/{USER}/config.toml")
    machine.run("systemctl", "start", USER)
    assert "did you mean url?" in machine.journal()

    machine.sh(f"printf '' >/etc/{USER}/config.toml")

    until(lambda: machine.show("ActiveState") == "active", machine.journal)


def test_a_reload_takes_up_a_good_configuration_and_refuses_a_bad_one(machine: Machine) -> None:
    machine.start()
    before, pid = machine.status()[1], machine.pid
    config = f"/etc/{USER}/config.toml"

    machine.sh(f"printf '\\n[outbox]\\nmax_size = \"64MiB\"\\n' >>{config}")
    machine.sh(f"systemctl reload {USER}")
    until(lambda: machine.status()[1]["outbox"]["max_bytes"] == 64 * 2**20, machine.journal)
    assert before["outbox"]["max_bytes"] == 2**30

    machine.sh(f"printf 'max_sise = 1\\n' >>{config}")
    machine.sh(f"systemctl reload {USER}")
    until(lambda: "did you mean max_size?" in machine.journal(), machine.journal)

    assert (machine.show("ActiveState"), machine.pid) == ("active", pid)
    assert machine.post("m-1") == 204
