"""Policies: how hard to compress the next step."""
