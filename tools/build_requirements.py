"""Prints the packages that compile fewbits, a line each, as a PEP 517 front end asks for them.

``static``: those that pyproject.toml names. ``dynamic``: those that the build backend adds for this machine,
cmake and ninja where there are none or old ones; run by an interpreter that has the static ones.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    if sys.argv[1:] == ["static"]:
        requirements = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    elif sys.argv[1:] == ["dynamic"]:
        from scikit_build_core.build import get_requires_for_build_wheel

        requirements = get_requires_for_build_wheel({})
    else:
        sys.exit("usage: build_requirements.py static | dynamic")
    print("\n".join(requirements))


if __name__ == "__main__":
    main()
