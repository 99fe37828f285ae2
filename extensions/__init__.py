"""What lives in guests. Imports nothing of the rest. Empty until the guest extension is built."""
