"""From the outbox to the upstream: what is sent when, and what an answer means.

    gate                    whether anything may go now, and if not, why
    lanes, census, claims   which events go next, and which go together
    batch                   the bytes of those that do
    breaker, concurrency    whether the upstream may be tried, and how much it bears at once
    backoff, budget         how long to wait after a failure; what a metered link may carry
    disposition, trials     what an answer means for the events; how those that failed have fared

decide, and are pure. `upstream` makes one call, over the connections of a `pool`, each of which is a
`wire`; `succession` puts another upstream in its place. `link` hears when the machine's network
changes; `tally` remembers over a kill what may have arrived; `supply` reads on in the outbox;
`forwarder` is the shell that reads clocks, runs tasks and carries decisions out, by a `plan`.
"""
