"""Pure state machines: (job, event) -> (job, commands). No clock, no database, no network."""
