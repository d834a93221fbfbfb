"""What the agent is known to do although it should not, and the judge overlooks for now.

Delete a word when that is mended: the test of the allowances fails then, and says so.

deaf_while_open         A Retry-After is ignored that comes when the link is backing off already, in
                        answer to what was in flight then.
strikes_of_any_kind     One failure of the network is enough to give up an event that failed in other ways
                        (5xx, 403) often enough. The network's failures were to count among themselves.
patience_by_wall_clock  How long an event fails with 5xx is measured by a clock that may be set: a month
                        forward gives it up at once, a month back keeps its user waiting for a month.
proof_from_before       That others were delivered since an event was first held, or not answered, counts
                        as proof that its 5xx are its own fault, though it was before the first of these.
sent_after_reading      An event that was let go, and whose body was being read when the link broke or a
                        person paused it, is sent all the same.
gateways_believed       A 502 or 504 counts as if nothing had been stored, though it means that whoever
                        answers has waited for the upstream in vain.
"""

from __future__ import annotations

from typing import Literal, get_args

Allowance = Literal[
    "deaf_while_open",
    "strikes_of_any_kind",
    "patience_by_wall_clock",
    "proof_from_before",
    "sent_after_reading",
    "gateways_believed",
]

ALLOWED: frozenset[Allowance] = frozenset(get_args(Allowance))
