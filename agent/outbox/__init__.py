"""The durable queue: where the two ends of the agent meet.

One connection writes (`writer`), in transactions shared by all who wait; short queries read
(`reader`). `records` are the plain values that cross this boundary, `schema` the tables and their
migrations, `store` the SQL verbs, `lock` the rule of one writer per outbox.
"""
