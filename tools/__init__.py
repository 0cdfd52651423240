"""What makes parts of this repository; no part of the package."""
