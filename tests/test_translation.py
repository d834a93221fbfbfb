"""Claims about what each part is told of a configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent import translation
from agent.config.loaded import Loaded
from agent.config.loading import load
from agent.exchange import Answer
from agent.ingest.destinations import Destinations
from agent.units import key_digest


def loaded(app_keys: dict[str, str] | None = None, **variables: str) -> Loaded:
    """Return a configuration of variables in which each key in *app_keys* is claimed by an upstream."""
    environ = {f"TRANTHOR_AGENT_{name}": text for name, text in variables.items()}
    return replace(load(None, environ, search=()), app_keys=digests(app_keys or {}))


def digests(app_keys: dict[str, str]) -> dict[str, str]:
    return {key_digest(key): upstream for key, upstream in app_keys.items()}


def upstream_of(destinations: Destinations, app_key: str) -> str | Answer:
    return destinations.of_key(app_key)


def test_apps_of_an_upstream_that_was_taken_out_stay_with_it_until_the_next_start() -> None:
    before = digests({"till": "crm"})

    now = translation.destinations(loaded({"web": "shop"}), ("", "crm", "shop"), before)

    assert upstream_of(now, "till") == "crm"
    assert upstream_of(now, "web") == "shop"


def test_an_app_that_its_upstream_claims_no_more_goes_to_the_default_one() -> None:
    before = digests({"till": "crm"})

    now = translation.destinations(loaded({"web": "crm"}), ("", "crm"), before)

    assert upstream_of(now, "till") == ""
    assert upstream_of(now, "web") == "crm"


def test_events_go_one_by_one_unless_their_upstream_takes_batches() -> None:
    settings = loaded(UPSTREAMS__CRM__MODE="batch").settings

    assert translation.plan(settings, "").batch == 1
    assert translation.plan(settings, "crm").batch == settings.forward.batch_events


def test_the_id_of_the_machine_joins_what_is_added_to_each_event() -> None:
    refine = translation.terms(replace(loaded(), machine_id="0c1d")).refine
    assert refine is not None
    event: dict[str, Any] = {"event": "Signed Up", "userId": "1043"}

    refine(event)

    assert event["context"] == {"agent": {"machineId": "0c1d"}}


def test_without_rules_events_are_stored_as_they_come() -> None:
    assert translation.terms(loaded()).refine is None
