"""Store-and-forward agent for Tranthor analytics events.

The way of an event:

    app ──POST──▶ ingest ──append──▶ outbox ──scan───▶ forward ──POST──▶ upstream
                  guard              one writer,        lanes, one a user   │
                  read, check        group commit       claim ─▶ Outcome ◀──┘
                  stamp time         SQLite, WAL+FULL   decide ─▶ Ack | Retry | Bury | Split
                  ◀──204── committed ◀────settle──────────┘
    person ──▶ console ──reads──▶ outbox;  ──asks──▶ daemon (loopback control API)

Apps are answered, and the upstream is spoken to, by protocols of our own on llhttp (httptools), for
aiohttp's took longer than all the rest of an event's way. aiohttp still opens the connections to the
upstream (names, TLS, proxies), and serves the sandbox.

The two ends meet only in the outbox. Decisions are pure: they know no clock, socket or database.

The levels; an import goes down, never up or sideways (`tests/test_levels.py` walks them):

    __main__                       the command line, whole
    daemon                         composition: db ⊃ writer ⊃ forwarder ⊃ server
    translation                    the configuration in the words of each part
    ingest | forward | console     the two ends, and the person's view; they never meet
    outbox                         the durable queue
    rereading                      the configuration read anew while the agent runs
    reload                         what of it may change then
    config, observe, systemd       settings in effect; logs; the service manager
    keys                           what can be set, as a table, and how it is written in a file
    contract, segment              what apps post, read strictly: JSON bytes -> Event; what Segment's
                                   SDKs send, in its words
    document, event, settings      a JSON tree without poison; one event; every key that can be set
    redaction, flow                what of an event is dropped, hashed or added before it is stored;
                                   how forwarding stands
    errors, clock, exchange, units exceptions by blame; time; one HTTP exchange as plain values;
                                   durations, sizes and secrets as people write them
"""

__version__ = "0.1.0"
