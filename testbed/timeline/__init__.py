"""The schedule as absolute changes of whole link states; pure data.

shapes/        what an entry of a schedule can be: set, ramp, sawtooth, square, walk, trace; one file each
moves          what a shape sees and what it yields
recording      traces: CSV and packet-delivery files
expand         schedule → changes: takeover, the end of the run, limits
"""

from testbed.timeline.expand import MAX_CHANGES, Change, expand

__all__ = ["MAX_CHANGES", "Change", "expand"]
