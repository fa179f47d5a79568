"""Limits for an ordinary user, in a group that was delegated: groups of the machine are made and
changed, so only under User-Mode Linux, with version 2 alone."""

import os
from pathlib import Path

import pytest
from test_limits import LIMITS

from testbed.labs.base import LabError
from testbed.labs.cgroups import clean, groups_of_run

pytestmark = pytest.mark.netem


def test_an_ordinary_user_needs_a_group_that_was_delegated(tmp_path):
    """As systemd-run --user --scope --property=Delegate=yes makes one; below the machine's own the
    user may make none."""
    user, top = 1234, Path("/sys/fs/cgroup")
    scope = top / "scope"
    (top / "cgroup.subtree_control").write_text("+memory +pids")
    scope.mkdir()
    for path in (scope, scope / "cgroup.procs", scope / "cgroup.subtree_control"):
        os.chown(path, user, user)

    def in_child(group):
        if (pid := os.fork()) == 0:
            (group / "cgroup.procs").write_text("0")
            os.setresuid(user, user, user)
            try:
                with groups_of_run(LIMITS.by_controller) as made:
                    told = made["memory"].parent == scope and made["memory"] == made["pids"]
                    os._exit(
                        0
                        if told and Path("/proc/self/cgroup").read_text().strip().endswith("/self")
                        else 1
                    )
            except LabError as error:
                os._exit(
                    2 if "no control group can be made (Permission denied)" in str(error) else 3
                )
            os._exit(4)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    try:
        assert in_child(scope) == 0
        assert in_child(top) == 2
    finally:
        clean(dry_run=False)
        scope.rmdir()
