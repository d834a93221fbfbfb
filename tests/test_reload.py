"""What a configuration read anew may change, and when it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.keys import KEYS
from agent.reload import AT_START, Refusal, Takeover, decide
from agent.settings import (
    Forward,
    Ingest,
    Log,
    NamedUpstream,
    Outbox,
    Settings,
    Upstream,
)
from agent.units import Bytes, WriteKey

ABLE = Settings(upstream=Upstream(url="https://a.example", write_key=WriteKey("key-1")))
UNABLE = Settings()


def taken_over(old: Settings, new: Settings, *problems: str) -> Takeover:
    verdict = decide(old, new, problems)
    assert isinstance(verdict, Takeover)
    return verdict


def test_what_may_change_is_taken_over_and_named_without_its_value() -> None:
    new = Settings(
        upstream=Upstream(url="https://b.example", write_key=WriteKey("key-2")),
        forward=Forward(concurrency=2),
        outbox=Outbox(max_size=Bytes(1024**2)),
        ingest=Ingest(allowed_hosts=("till-7.local",)),
        log=Log(level="debug"),
    )
    verdict = taken_over(ABLE, new)
    assert verdict.settings == new
    assert set(verdict.changed) == {
        "upstream.url",
        "upstream.write_key",
        "forward.concurrency",
        "outbox.max_size",
        "ingest.allowed_hosts",
        "log.level",
    }
    assert verdict.postponed == ()


def test_what_only_a_start_can_change_stays_and_is_named() -> None:
    new = Settings(
        upstream=ABLE.upstream,
        ingest=Ingest(
            host="::1",
            port=1,
            unix_socket="/run/a.sock",
            unix_socket_mode="0600",
            max_body=Bytes(2048),
        ),
        outbox=Outbox(path=Path("/elsewhere.db")),
        log=Log(format="json"),
    )
    verdict = taken_over(ABLE, new)
    assert set(verdict.postponed) == AT_START
    assert verdict.changed == ("ingest.max_body",)
    assert verdict.settings.ingest == Ingest(max_body=Bytes(2048))
    assert (verdict.settings.outbox, verdict.settings.log) == (ABLE.outbox, ABLE.log)


def test_the_keys_of_a_start_are_keys() -> None:
    assert set(KEYS) > AT_START


def test_which_upstreams_there_are_is_changed_by_the_next_start_alone() -> None:
    old = Settings(upstreams={"crm": NamedUpstream(url="https://a.example")})
    new = Settings(
        upstream=Upstream(url="https://b.example"),
        upstreams={"crm": NamedUpstream(url="https://c.example"), "shop": NamedUpstream()},
    )

    verdict = decide(old, new, [])

    assert isinstance(verdict, Takeover)
    assert verdict.changed == ("upstream.url", "upstreams.crm")
    assert verdict.postponed == ("upstreams",)
    assert verdict.settings.upstreams == {"crm": new.upstreams["crm"]}
    assert verdict.settings.upstream == new.upstream


def test_nothing_changed_is_a_takeover_of_nothing() -> None:
    assert taken_over(ABLE, ABLE) == Takeover(settings=ABLE, changed=(), postponed=())


@pytest.mark.parametrize("new", [UNABLE, ABLE])
def test_one_that_can_deliver_is_not_given_up_for_one_with_a_problem(new: Settings) -> None:
    assert decide(ABLE, new, ["no key", "no url"]) == Refusal("no key; no url")


def test_without_anything_to_lose_a_problem_is_no_reason_to_refuse() -> None:
    new = Settings(upstream=Upstream(url="https://a.example"))
    assert taken_over(UNABLE, new, "no key").settings == new
