"""Compression of gradients: selection, packing, error feedback."""
