"""From the outbox to the upstream: what is sent when, and what an answer means.

`backoff`, `breaker`, `disposition` and `lanes` decide and are pure; `upstream` makes one call, and
`succession` puts another in its place; `link` hears when the machine's network changes;
`forwarder` is the shell that reads clocks, runs tasks and carries decisions out.
"""
