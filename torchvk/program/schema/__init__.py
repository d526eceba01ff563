"""Accessors for ExecuTorch's .pte files, generated from its published FlatBuffers schema."""
