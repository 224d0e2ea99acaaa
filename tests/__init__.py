"""The tests: a package, so that they can import `tests.fixtures` from the repository root."""
