"""What lives in guests. CONTRACT.md says what it promises; the folders beside this file are what is put there."""

VERSION = "0.1.0"
"""Of the extension."""
CONTRACT = 1
"""Of CONTRACT.md."""
