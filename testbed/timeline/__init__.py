"""The schedule as absolute changes of whole link states; pure data.

- ``patterns``: what an entry of a schedule can be: set, ramp, sawtooth, square, walk, trace; one
file each
- ``updates``: what a pattern sees of a link, and what it yields
- ``pairs``: two values for each property, as sawtooth, square and walk have them
- ``duration``: entries that go on for some time; ``field_types``: types of their fields
- ``recording``: trace files
- ``workers``: entries about workers: kill, restart, slow
- ``changes``: schedule → changes: who takes over from whom, the end of the run, limits
"""

from testbed.timeline.changes import MAX_CHANGES, Change, expand

__all__ = ["MAX_CHANGES", "Change", "expand"]
