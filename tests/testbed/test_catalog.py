"""Names and options, checked without torch."""

from importlib.metadata import EntryPoint

import pytest

from netsenseml import catalog
from testbed import catalog as workloads

pytestmark = pytest.mark.fast


def test_defaults_are_filled_in() -> None:
    assert catalog.check_method("topk") == {"ratio": 0.1, "values": "bf16"}
    assert catalog.check_method("topk", {"ratio": 1})["ratio"] == 1.0
    assert catalog.check_method("allreduce") == {}
    assert workloads.check_model("mlp") == {"hidden": [512, 512]}
    assert workloads.check_data("digits") == {}
    assert workloads.check_optimizer("sgd", {"lr": 0.2, "momentum": 0.9})["nesterov"] is False


@pytest.mark.parametrize(
    "table", [catalog.METHODS, workloads.MODELS, workloads.DATA, workloads.OPTIMIZERS]
)
def test_every_default_is_valid_and_every_option_explained(
    table: dict[str, dict[str, catalog.Option]],
) -> None:
    for options in table.values():
        for option in options.values():
            assert option.check(option.default) == option.default
            assert option.help and option.expected


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("topkk", {}, "unknown method 'topkk'; choose from topk, "),
        ("topk", {"ratoi": 0.1}, "method 'topk' has no option 'ratoi'; its options: ratio"),
        (
            "allreduce",
            {"ratio": 0.1},
            "method 'allreduce' has no option 'ratio'; its options: none",
        ),
        ("topk", {"ratio": 0}, "method 'topk': ratio must be a number > 0 and <= 1, not 0"),
        ("topk", {"ratio": 1.5}, "ratio must be a number > 0 and <= 1, not 1.5"),
        ("topk", {"ratio": "half"}, "ratio must be a number > 0 and <= 1, not 'half'"),
        ("topk", {"ratio": True}, "not True"),
        ("topk", {"ratio": float("nan")}, "not nan"),
        ("topk", {"values": "int9"}, "values must be one of fp32, bf16, int8, int4, not 'int9'"),
        ("qsgd", {"bits": True}, "bits must be one of 8, 4, not True"),
        ("netsense", {"policy": "fixed"}, "policy 'fixed' needs schemes"),
        ("netsense", {"schemes": ["int8"]}, "schemes is for policy: fixed, not for progress"),
        (
            "netsense",
            {"policy": "fixed", "schemes": ["int9"]},
            "unknown scheme 'int9'; there are allreduce",
        ),
        (
            "netsense",
            {"policy": "fixed", "schemes": ["sparse-int8@0%"]},
            "unknown scheme 'sparse-int8@0%'",
        ),
        (
            "netsense",
            {"policy": "fixed", "schemes": [1]},
            "schemes must be a list of texts, not [1]",
        ),
    ],
)
def test_errors_are_one_line_that_names_the_choices(
    name: str, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError) as error:
        catalog.check_method(name, options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_lists_and_booleans() -> None:
    assert workloads.check_model("mlp", {"hidden": [3]}) == {"hidden": [3]}
    for wrong in ([0], [1.5], "3", [True]):
        with pytest.raises(ValueError, match="a list of positive integers"):
            workloads.check_model("mlp", {"hidden": wrong})
    with pytest.raises(ValueError, match="true or false"):
        workloads.check_optimizer("sgd", {"nesterov": 1})
    with pytest.raises(ValueError, match="nesterov needs momentum"):
        workloads.check_optimizer("sgd", {"nesterov": True})


def test_methods_of_installed_packages_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "my.package:Method", catalog.ENTRY_POINTS)
    monkeypatch.setattr(
        catalog, "entry_points", lambda group: [point] if group == catalog.ENTRY_POINTS else []
    )
    assert catalog.check_method("mine", {"anything": 1}) == {"anything": 1}
    with pytest.raises(ValueError, match="choose from mine"):
        catalog.check_method("mime")


def test_code_of_the_users_own_is_taken_as_it_is() -> None:
    assert catalog.check_method("my.package:Method", {"anything": [1]}) == {"anything": [1]}
    for not_a_path in ("my.package:", ":Method", "my package:Method", "a:b:c"):
        with pytest.raises(ValueError, match="unknown method"):
            catalog.check_method(not_a_path)
