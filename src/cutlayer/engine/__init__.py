"""The engine: runs programs on tensors. Knows torch, but no file, socket, clock or transport."""
