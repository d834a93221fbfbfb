"""The durable queue: where the two ends of the agent meet.

    writer     all that is written: group commit, recovery from faults
    intake     what waits for the writer, and how much may: backpressure
    opening    the writer's connection: opened, again after a fault, anew after damage
    room       who is let in: quota, disk, and the `reserve` kept back for deliveries
    database   the one write connection; `schema` its tables and migrations
    store      the SQL verbs, in a transaction of the writer's; `ids` knows each messageId, `apps` what
               came from which app, `backlogs` what waits for which upstream, and `procedures` does
               in one statement what is done for every event
    letters, pauses
               the verbs of a person
    news       wakes the forwarder that an event is for
    reader     short queries, of the daemon's and of others; `search` words those of people, `access`
               is how a reader gets in
    lock       one writer per outbox; `files` what each file is called, and whose it is
    upkeep     what is due from time to time
    aside, rescue, restore, salvage
               what becomes of a damaged database: moved away, read page by page, put back
    records, refusals
               the plain values that cross this boundary; what an error means to a client

docs/outbox.md has the files, the life of an event, and what each accident leaves.
"""
