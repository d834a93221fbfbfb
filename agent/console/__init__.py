"""What a person sees and does: commands, status, dashboard, demo and sandbox."""
