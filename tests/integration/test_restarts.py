"""Workers that die and are started again: the job goes on from its last checkpoint, and what was
lost is told."""

import pytest
from test_faults_netns import WORKLOAD, finished, launch, problems, run, script
from test_run_netns import only_run

import testbed

CELL = {
    "workers": 2,  # whose sums do not depend on their order
    "methods": [{"name": "topk", "ratio": 0.1}],
    "workload": {
        **WORKLOAD,
        "stop": {"steps": 60},
        "checkpoint_every": 7,
        "evaluate_every": "200ms",
    },
}


@pytest.mark.netns
def test_a_run_with_a_killed_worker_ends_as_one_without(tmp_path):
    kill = [{"at": "600ms", "kill": "w1"}]
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "without", **CELL)[0] == 0
    code, printed = run(tmp_path / "with", **CELL, on_failure="continue", schedule=kill)
    assert code == 0, printed
    assert (
        "w1 was ended by signal 9, as the schedule has it" in printed
        and "all were started again" in printed
    )
    plain, killed = (testbed.load_run(only_run(tmp_path / name)) for name in ("without", "with"))
    # What was kept by error feedback, the optimizer's momentum and the order of the samples: all of
    # it, to the last bit.
    assert list(killed.cells["parameters"]) == list(plain.cells["parameters"])
    assert not list(only_run(tmp_path / "with").glob("cells/*/hosts/*/checkpoint-*"))
    assert [cell["restarts"] for cell in killed.summary["cells"]] == [1]
    failures, steps = killed.failures.sort_values("t_s"), killed.steps
    assert list(failures["kind"]) == ["kill", "failure", "restart"]
    assert set(failures["worker"]) == {"w1", ""}
    restart_s = failures["t_s"].max()
    first = steps.loc[steps["t_s"] > restart_s, "step"].min()
    before = steps.loc[steps["t_s"] < restart_s, "step"].max()
    assert first % 7 == 0 and 0 < first <= before + 1 <= first + 8
    assert sorted(steps.loc[steps["rank"] == 0, "step"].unique()) == list(range(60))


@pytest.mark.netns
def test_a_script_is_told_how_often_it_was_started_again(tmp_path):
    """As by torchrun. One that fails at the same step each time is given up, and tells why."""
    file = script(
        tmp_path,
        """
        label = json.loads((cell / "cell.json").read_text())["label"]
        begun = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        kept = Path(os.environ["NETSENSE_OUTPUT_DIR"]) / "kept"
        kept.write_text((kept.read_text() if begun else "") + str(begun))
        def fail(step):
            if rank == 1 and step == 8 and (label == "always" or begun < 2):
                raise ArithmeticError("no more numbers")
        train(12, before=fail)
        assert kept.read_text() == "012"
        done()
        """,
    )
    methods = [{"name": "allreduce", "label": "twice"}, {"name": "bf16", "label": "always"}]
    code, printed = run(tmp_path, script=file, methods=methods, on_failure="continue")
    run_directory = only_run(tmp_path)
    assert code == 1, printed
    assert [cell["valid"] for cell in testbed.load_run(run_directory).summary["cells"]] == [
        False,
        True,
    ]
    (problem,) = problems(tmp_path)
    assert (
        "ArithmeticError: no more numbers" in problem
        and "3 new starts in a row came no further than step" in problem
    )


@pytest.mark.docker
def test_in_docker_too_and_with_several_ranks_a_worker(tmp_path):
    schedule = [{"at": "600ms", "restart": ["w0", "w1"]}]
    process = launch(tmp_path, "--lab", "docker", **CELL, ranks_per_worker=2, schedule=schedule)
    code, printed = finished(process)
    assert code == 0, printed
    (cell,) = testbed.load_run(only_run(tmp_path)).summary["cells"]
    assert (cell["valid"], cell["restarts"], cell["steps"], cell["replicas_identical"]) == (
        True,
        1,
        60,
        True,
    )
