"""The console script ``testbed``. The library alone installs it, too, but what the testbed needs
comes with the extra.

So nothing else of the testbed is imported here before it is certain that a package which is missing
can be named.
"""

import re
import sys

_OTHER_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Modules that are called otherwise than the package that brings them."""
_EXIT_CANNOT = 4


def modules_of_the_extra() -> frozenset[str]:
    """Modules that ``pip install 'netsenseml[testbed]'`` brings; none where the distribution is not
    installed."""
    from importlib import metadata  # takes a while, which completion in a shell does not have

    try:
        requirements = metadata.requires("netsenseml") or []
    except metadata.PackageNotFoundError:
        return frozenset()
    wanted = [text for text in requirements if re.search(r"""extra == ['"]testbed['"]""", text)]
    names = [re.split(r"[^\w.-]", text, maxsplit=1)[0].lower() for text in wanted]
    return frozenset(_OTHER_NAMES.get(name, name) for name in names)


def main() -> None:
    """Entry point of the console script."""
    try:
        from testbed.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in modules_of_the_extra():
            raise  # a fault of ours, or of the user's own code
        fix = "pip install 'netsenseml[testbed]' (in a checkout: pip install '.[testbed]')"
        print(
            f"testbed: the package {missing} is missing; install what the testbed needs with:"
            f" {fix}",
            file=sys.stderr,
        )
        sys.exit(_EXIT_CANNOT)


if __name__ == "__main__":
    main()
