"""What the agent lets be seen of itself: log lines and metrics. Decides nothing, stores nothing."""
