"""Real guests for tests, and the tests of those guests."""
