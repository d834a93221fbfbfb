"""What tests ask of an open outbox."""

from __future__ import annotations

from agent.outbox.writer import Writer


async def used_bytes(writer: Writer) -> int:
    """Return the bytes of the database in use."""
    return (await writer.perform(lambda store: store.space())).used
