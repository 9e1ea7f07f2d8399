"""Hugging Face safetensors in and out, streamed chunk by chunk; nothing here reads or writes a pickle."""
