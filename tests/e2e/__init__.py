"""End to end: a guest's files by their hashes, before the backup and after the restore."""
