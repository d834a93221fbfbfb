"""What the agent lets be seen of itself: log lines. Decides nothing, stores nothing."""
