"""Every key of the configuration: its type, default, range and help, in one place.

From these the decoder, the error messages, `config show` and the example file are all made
(`agent.keys`, `agent.config`). Does not own what a setting does, nor where it is read from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from agent.redaction import additions, droppable, hash_key, hashable
from agent.units import (
    Bytes,
    GiB,
    KiB,
    MiB,
    ProxyUrl,
    Seconds,
    Secret,
    WriteKey,
    file_mode,
    host_names,
    http_proxy,
    loopback,
    server_root,
    sha256_digests,
    socket_path,
    time_windows,
    user_names,
    web_origins,
)

DEFAULT_UPSTREAM = "default"
"""What people call [upstream], which has no name of its own."""

UPSTREAM_NAME = r"(?=.{1,32}\Z)[a-z0-9]+(?:-[a-z0-9]+)*"
"""What a named upstream may be called: it is a part of paths, of variables and of file names."""

APP_NAME = UPSTREAM_NAME

_CENTURY_S = 36_500 * 86_400.0
"""The longest duration where no other limit makes sense: beyond it a slip, and instants overflow."""


@dataclass(frozen=True, slots=True)
class Help:
    """What a person is told about a key, and what it may hold beyond its type.

    *low* and *high* are inclusive and come together. *allowed* completes "Allowed: ..." where no
    range says it. *check* returns the value in one form; its ValueError is what stands in the error message.
    """

    text: str
    low: float | None = field(default=None, kw_only=True)
    high: float | None = field(default=None, kw_only=True)
    allowed: str = field(default="", kw_only=True)
    check: Callable[[Any], Any] | None = field(default=None, kw_only=True)


class Ingest(msgspec.Struct, frozen=True, kw_only=True):
    host: Annotated[
        str,
        Help(
            "The address to listen on. Whoever reaches it may post, so it never leaves this machine."
            ' Change it to "::1" where apps speak IPv6 only.',
            allowed='a loopback address or "localhost"',
            check=loopback,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Help(
            "The TCP port to listen on; 0 takes any free one, which suits tests. Change it when"
            " something else holds this port, and tell the apps.",
            low=0,
            high=65_535,
        ),
    ] = 7227
    max_body: Annotated[
        Bytes,
        Help(
            "The largest request body, after decompression; a larger one is answered 413. More than"
            " the default would be of no use: the upstream refuses it. Lower it where memory is scarce.",
            low=KiB,
            # Fastify's bodyLimit at the upstream, exactly; an oversized request is cut off there.
            high=5 * MiB,
        ),
    ] = Bytes(5 * MiB)
    allowed_hosts: Annotated[
        tuple[str, ...],
        Help(
            "Names by which apps may call the agent beside 127.0.0.1, localhost and [::1]. Any other"
            " Host is refused, which keeps web pages out that point their own name at this machine."
            ' Add one where apps use an entry of /etc/hosts: ["till-7.local"].',
            allowed="a list of host names without port",
            check=host_names,
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        Help(
            "Web origins whose pages may post from a browser on this machine. None may by default;"
            ' add those of your own kiosk or shop, exactly: ["https://shop.example"].',
            allowed="a list of scheme://host[:port]; no path and no wildcard",
            check=web_origins,
        ),
    ] = ()
    unix_socket: Annotated[
        str,
        Help(
            "Listen on this Unix socket too; its mode, its folder's and unix_socket_users decide who"
            ' may post there. Empty for none. Under systemd "/run/tranthor-agent/ingest.sock" is a'
            " good place.",
            allowed="a path that begins with /",
            check=socket_path,
        ),
    ] = ""
    unix_socket_mode: Annotated[
        str,
        Help(
            'The mode of that socket: "0660" lets the agent\'s user and group connect, "0666" every'
            " user who may enter its folder.",
            allowed='an octal mode in quotes, such as "0660"',
            check=file_mode,
        ),
    ] = "0660"
    unix_socket_users: Annotated[
        tuple[str, ...],
        Help(
            "Users, by name or number, who alone may post on that socket; the kernel says who is at"
            " the other end. Empty for everyone whom its mode lets.",
            allowed="a list of users of this machine",
            check=user_names,
        ),
    ] = ()
    require_token: Annotated[
        bool,
        Help(
            "Take events only from apps that are known: by a token (tranthor-agent app add NAME), or"
            " on the Unix socket by the users of [apps.NAME]. All others are answered 401.",
        ),
    ] = False


class Redact(msgspec.Struct, frozen=True, kw_only=True):
    drop: Annotated[
        tuple[str, ...],
        Help(
            'Paths of values that are left out: ["properties.email", "context.ip", "files"]. An array'
            ' on the way is gone through; "*" is any one name; a name with a dot in it stands in'
            " quotes: 'properties.\"e.mail\"'. An event must keep its ids; those can be hashed.",
            allowed="a list of paths, names with dots between them",
            check=droppable,
        ),
    ] = ()
    hash: Annotated[
        tuple[str, ...],
        Help(
            'Paths of values of which a keyed hash is stored: ["userId", "traits.email"], written as'
            " above. The same value has the same hash wherever it stands, so that it can still be"
            " counted and joined. Without a key the agent does not start.",
            allowed="a list of paths, names with dots between them",
            check=hashable,
        ),
    ] = ()
    key: Annotated[
        Secret | None,
        Help(
            "The key of these hashes. Handy to try things; on a machine in the field keep it in a file"
            " of its own, or hand it over as the systemd credential redact_key. With another key every"
            " hash is another.",
            allowed="16 or more printable ASCII characters; not together with key_file",
            check=hash_key,
        ),
    ] = None
    key_file: Annotated[
        Path | None,
        Help(
            "A file that holds that key and nothing else, readable by the agent alone. Without this and"
            " key, the systemd credential redact_key is used if there is one.",
        ),
    ] = None

    @property
    def unhashable(self) -> bool:
        """Whether values are to be hashed, and there is no key: then no event may be taken."""
        return bool(self.hash) and self.key is None


class Context(msgspec.Struct, frozen=True, kw_only=True):
    agent: Annotated[
        tuple[str, ...],
        Help(
            'What to add, a name and a text each: ["site=berlin-3", "till=7"]. It wins over what an app'
            " has there by the same name.",
            allowed='a list of texts "name=value"',
            check=additions,
        ),
    ] = ()
    machine_id: Annotated[
        bool,
        Help(
            "Add machineId, which is the same for as long as the system stays installed. It is made of"
            " /etc/machine-id, and does not give that away.",
            allowed="true or false",
        ),
    ] = False


class Outbox(msgspec.Struct, frozen=True, kw_only=True):
    path: Annotated[
        Path,
        Help(
            "The SQLite file that keeps the events. Empty means outbox.db in systemd's state"
            " directory, in /var/lib/tranthor-agent where /etc/tranthor-agent/config.toml is in use,"
            " or else in your user data folder. It belongs on a local disk: SQLite cannot lock"
            " reliably over a network.",
        ),
    ] = Path()
    max_size: Annotated[
        Bytes,
        Help(
            "How much disk the outbox may take. At 1 KB an event the default holds the better part of"
            " a million: make it events per day, times their size, times the longest outage to be survived.",
            low=MiB,
            # The largest file that ext4 holds with 4 KiB blocks.
            high=16_384 * GiB,
        ),
    ] = Bytes(GiB)
    when_full: Annotated[
        Literal["reject", "drop_oldest"],
        Help(
            'What gives way when max_size is reached. "reject" answers 507 to the app, so that nothing'
            ' accepted is ever lost. "drop_oldest" discards, and counts, the oldest waiting events:'
            " for apps that cannot wait and data where the latest matters most.",
        ),
    ] = "reject"
    max_size_per_app: Annotated[
        Bytes | None,
        Help(
            "How much of max_size one app may take, with what waits and with its dead letters, so that one"
            " that runs wild leaves room for the others. Over it that app is answered 507, also where"
            ' when_full is "drop_oldest". Empty for no limit; max_size of [apps.NAME] counts before'
            " it. It is for apps that are known, by a token or as a user.",
            low=MiB,
            high=16_384 * GiB,
        ),
    ] = None
    max_age: Annotated[
        Seconds | None,
        Help(
            "Set an event aside as a dead letter when it has waited this long. Empty means never. Set"
            " it where late data does harm; a person can still list, requeue or discard what expired.",
            low=1,
            high=_CENTURY_S,
        ),
    ] = None
    delivered_retention: Annotated[
        Seconds,
        Help(
            "How long the ids of delivered events are remembered, so that an app that repeats one does"
            ' not have it counted twice. "0s" forgets at once: a receipt then ends as unknown. Raise it for apps that repeat after'
            " weeks; each id takes a little room, within max_size.",
            low=0,
            high=_CENTURY_S,
        ),
    ] = Seconds(7 * 86_400)


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    url: Annotated[
        str,
        Help(
            'The root of the Tranthor server: "https://app.tranthor.com". The agent adds the path.'
            " While it is empty, events are stored and wait. Plain http:// is for this machine only.",
            allowed="http:// or https:// with a host, an optional port, and no path",
            check=server_root,
        ),
    ] = ""
    write_key: Annotated[
        WriteKey | None,
        Help(
            "The write key of your workspace. A bare key is sent as Bearer; one with a scheme"
            ' ("Basic ...") as it is. Handy to try things; on a machine in the field keep the key in'
            " a file of its own, or hand it over as the systemd credential write_key.",
            allowed="printable ASCII text; not together with write_key_file",
        ),
    ] = None
    write_key_file: Annotated[
        Path | None,
        Help(
            "A file that holds the write key and nothing else, readable by the agent alone. Without"
            " this and write_key, the systemd credential write_key is used if there is one.",
        ),
    ] = None
    mode: Annotated[
        Literal["track", "batch"],
        Help(
            'How events travel. "track" sends each in a request of its own, as the API documents it;'
            ' "batch" sends what waits together, many times faster over a long round trip, and finds'
            " by itself the one that the upstream refuses.",
        ),
    ] = "track"
    connect_timeout: Annotated[
        Seconds,
        Help(
            "How long to try for a connection, TLS included. Raise it on satellite or very slow links.",
            low=0.1,
            high=3_600,
        ),
    ] = Seconds(10)
    timeout: Annotated[
        Seconds,
        Help(
            "How long the upstream may stay silent during one request. Too short repeats events: an"
            " answer that comes after it may belong to an event that was stored.",
            low=0.1,
            high=3_600,
        ),
    ] = Seconds(30)
    ca_file: Annotated[
        Path | None,
        Help(
            "Certificate authorities to trust, in PEM, in place of the system's. For a private CA or a"
            " proxy that inspects TLS.",
        ),
    ] = None
    client_cert: Annotated[
        Path | None,
        Help(
            "A client certificate in PEM, where the server asks for one (mutual TLS).",
        ),
    ] = None
    client_key: Annotated[
        Path | None,
        Help(
            "The private key of client_cert, in PEM. Empty when client_cert holds both.",
            allowed="a path; only together with client_cert",
        ),
    ] = None
    proxy: Annotated[
        ProxyUrl | None,
        Help(
            'The HTTP proxy to go through, such as "http://proxy.local:3128". Variables like'
            " HTTPS_PROXY are not read, so that nothing but this file redirects your data.",
            allowed="http:// or https:// with a host; user:password@ before it is kept secret",
            check=http_proxy,
        ),
    ] = None


class NamedUpstream(Upstream, frozen=True, kw_only=True):
    app_key_sha256: Annotated[
        tuple[str, ...],
        Help(
            "Which apps' events go here: SHA-256 digests, in hex, of the write keys that they send in"
            " Authorization (printf %s KEY | sha256sum). The key itself is kept nowhere. An app whose"
            " key nobody claims posts to [upstream].",
            allowed="a list of digests of 64 hex digits",
            check=sha256_digests,
        ),
    ] = ()
    app_key_files: Annotated[
        tuple[Path, ...],
        Help(
            "The same by files that hold such a key each and nothing else; write_key_file may be one of"
            " them, where apps send the very key that goes upstream.",
            allowed="a list of paths",
        ),
    ] = ()


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    concurrency: Annotated[
        int,
        Help(
            "How many requests may be under way at once. Raise it when a backlog drains too slowly"
            " over a long round trip; lower it to go easy on a thin link.",
            low=1,
            high=256,
        ),
    ] = 8
    order: Annotated[
        Literal["per_user", "none"],
        Help(
            '"per_user" delivers the events of one user in the order they were accepted; different'
            ' users never wait for each other. "none" drops that promise for speed, when nearly all'
            " events belong to one user.",
        ),
    ] = "per_user"
    batch_events: Annotated[
        int,
        Help(
            'How many events one request carries at most, where upstream.mode is "batch"; never more'
            " than the 5 MiB that the upstream takes. Lower it on a link that breaks off long requests.",
            low=1,
            high=1_000,
        ),
    ] = 200
    max_events_per_s: Annotated[
        int,
        Help(
            "How many events a second may leave, on average; 0 for as many as the upstream bears.",
            low=0,
            high=1_000_000,
        ),
    ] = 0
    max_bytes_per_s: Annotated[
        Bytes,
        Help(
            'How many bytes a second may leave, on average: bodies, and 400 for each request. "0B" for'
            " no limit. For a thin link that others need, too.",
            low=0,
            high=GiB,
        ),
    ] = Bytes(0)
    max_bytes_per_day: Annotated[
        Bytes,
        Help(
            'How many bytes may leave from midnight to midnight, counted as above. "0B" for no limit.'
            " For a link that is paid by volume; what is over it waits for the next day.",
            low=0,
            high=1_024 * GiB,
        ),
    ] = Bytes(0)
    windows: Annotated[
        tuple[str, ...],
        Help(
            'The times of day, in local time, at which events may leave: ["22:00-06:00"]. Empty for'
            " always.",
            allowed='a list of times "HH:MM-HH:MM"',
            check=time_windows,
        ),
    ] = ()
    always: Annotated[
        tuple[str, ...],
        Help(
            "Names of events that go at any time, in spite of windows and budgets:"
            ' ["Payment Failed"]. To keep the order, what the same user has waiting before goes along;'
            ' with order = "none" they go alone.',
            allowed="a list of event names",
        ),
    ] = ()
    backoff_base: Annotated[
        Seconds,
        Help(
            "The wait after a first failure; it doubles with each further one, and a random part of it"
            " is used, so that a fleet does not come back in step.",
            low=0.01,
            high=3_600,
        ),
    ] = Seconds(1)
    backoff_max: Annotated[
        Seconds,
        Help(
            "Where that doubling ends: the longest wait before the network is tried again. Lower it to"
            " notice a returning network sooner, at the price of more attempts.",
            low=0.01,
            high=86_400,
        ),
    ] = Seconds(300)
    max_attempts: Annotated[
        int,
        Help(
            "An event that the upstream keeps answering with 5xx is set aside as a dead letter after"
            " this many attempts, and not before the time of the next two keys. An outage of the network"
            " never counts.",
            low=1,
            high=1_000_000,
        ),
    ] = 20
    give_up_after: Annotated[
        Seconds,
        Help(
            "How long such an event is tried at least, counted from its first 5xx since the agent"
            " started, when others were delivered meanwhile: then the event is at fault.",
            low=0,
            high=_CENTURY_S,
        ),
    ] = Seconds(3_600)
    give_up_unproven_after: Annotated[
        Seconds,
        Help(
            "The same when nothing else was delivered meanwhile, so that one bad event cannot be told"
            " from a sick upstream. Keep it longer than an upstream's worst day.",
            low=0,
            high=_CENTURY_S,
        ),
    ] = Seconds(86_400)
    hold_probe: Annotated[
        Seconds,
        Help(
            "How often a held queue is tried with one event. A queue is held while something is wrong"
            " that a person must fix, such as the write key; once fixed, it flows again by itself.",
            low=0.1,
            high=86_400,
        ),
    ] = Seconds(60)


class AppSettings(msgspec.Struct, frozen=True, kw_only=True):
    users: Annotated[
        tuple[str, ...],
        Help(
            "Users, by name or number, whose events on the Unix socket come from this app, without a"
            " token.",
            allowed="a list of users of this machine",
            check=user_names,
        ),
    ] = ()
    max_size: Annotated[
        Bytes | None,
        Help(
            "How much of outbox.max_size this app may take, in place of outbox.max_size_per_app.",
            low=MiB,
            high=16_384 * GiB,
        ),
    ] = None


class Log(msgspec.Struct, frozen=True, kw_only=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Help(
            '"error" says what a person must act on, "warning" adds what heals by itself, "info" the'
            ' life of the daemon, "debug" each step. No level shows payloads, user ids or keys.',
        ),
    ] = "info"
    format: Annotated[
        Literal["auto", "console", "json"],
        Help('"auto" writes for people on a terminal and JSON Lines everywhere else.'),
    ] = "auto"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be configured, decoded. `Settings()` is the defaults.

    *upstreams* are the tables [upstreams.NAME] by name, *apps* those of [apps.NAME].
    """

    ingest: Annotated[Ingest, Help("Where apps on this machine hand in their events.")] = Ingest()
    redact: Annotated[
        Redact,
        Help("What of an event is never stored, nor sent. For events accepted from now on."),
    ] = Redact()
    context: Annotated[
        Context, Help("What is added to each event, under context.agent, before it is stored.")
    ] = Context()
    outbox: Annotated[Outbox, Help("Where events wait, safe on disk, until delivered.")] = Outbox()
    upstream: Annotated[Upstream, Help("Where events go, and with which key.")] = Upstream()
    forward: Annotated[Forward, Help("How events are sent, and how failures are met.")] = Forward()
    log: Annotated[Log, Help("What the agent says about itself, on standard error.")] = Log()
    upstreams: Annotated[
        dict[str, NamedUpstream],
        Help(
            "One more upstream for each such section, beside [upstream]: with a queue and a key of its"
            " own, none waiting for another. The name is in lower-case letters, digits and dashes, up"
            " to 32. It takes every key of [upstream], and two more. Events come here by the path"
            " (/w/crm/ before the usual one) or by the write key that the app sends; as a systemd"
            " credential its own key is write_key.crm. outbox.max_size is for all of them together."
        ),
    ] = msgspec.field(default_factory=dict)

    apps: Annotated[
        dict[str, AppSettings],
        Help(
            "What is special about one app, a section for each. It need not stand here: an app is known"
            " by a token, which `tranthor-agent app add NAME` gives out, or by its users. The name is"
            " in lower-case letters, digits and dashes, up to 32; status and receipts show it."
        ),
    ] = msgspec.field(default_factory=dict)

    def quota_of(self, app: str) -> int | None:
        """Return how many bytes of the outbox one app may take; None: as many as there is room for."""
        section = self.apps.get(app)
        own = None if section is None else section.max_size
        quota = self.outbox.max_size_per_app if own is None else own
        return None if quota is None else int(quota)

    def upstream_of(self, name: str) -> Upstream:
        """Return the section of one upstream; that without a name is the default one."""
        return self.upstreams[name] if name else self.upstream
