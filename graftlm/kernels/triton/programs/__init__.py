"""The Triton programs; each file is imported at first use, since triton may be missing."""
