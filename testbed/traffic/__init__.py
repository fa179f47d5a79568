"""Competing traffic: what flows when (``flows``, ``plan``), and the programs that make it on the
hosts (``program``)."""
