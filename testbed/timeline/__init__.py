"""The schedule as absolute changes of whole link states; pure data.

- ``shapes``: what an entry of a schedule can be: set, ramp, sawtooth, square, walk, trace; one file each
- ``moves``: what a shape sees of a link, and what it yields
- ``recording``: trace files
- ``workers``: entries about workers: kill, restart, slow
- ``changes``: schedule → changes: who takes over from whom, the end of the run, limits
"""

from testbed.timeline.changes import MAX_CHANGES, Change, expand

__all__ = ["MAX_CHANGES", "Change", "expand"]
