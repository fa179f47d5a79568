"""The rights that shaping containers from outside takes."""

import re
from pathlib import Path

CAPABILITIES = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_PTRACE": 19, "SYS_ADMIN": 21}
"""Bits of <linux/capability.h>."""


def lacking_capabilities() -> list[str]:
    """Names of ``CAPABILITIES`` that this process does not have."""
    match = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    held = int(match[1], 16) if match else 0
    return [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
