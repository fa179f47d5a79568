"""Collectives over the process group: all-reduce and gather of fixed slots."""
