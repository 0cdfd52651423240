"""What runs on the GPU, written in Triton's language; each file is imported at first use, for triton may be missing."""
