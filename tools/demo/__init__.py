"""The recipe that made the bundled base and its data."""
