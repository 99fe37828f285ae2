"""The command line: what is typed becomes a call of the service, what it answers becomes text or JSON lines."""
