"""The ground floor: what every part agrees on. Standard library and pydantic only."""
