"""What a GGUF file says, and how it says it: read within limits, and mapped to and from Hugging Face names."""
