"""What a person sees and does: commands, status, control API, demo and sandbox."""
