"""Print requirements.lock: installed versions of what Trimtab and its extras (`docs` apart) reach."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(wanted: list[str]) -> dict[str, str]:
    """Name -> version of each installed distribution that the requirements reach on this machine."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(text) for text in wanted]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen or name == "trimtab":
                continue
            seen.add((name, extra))
            try:
                installed = distribution(name)
            except PackageNotFoundError:
                raise SystemExit(f"{name} is needed and not installed: pip install {requirement}") from None
            found[name] = installed.version.split("+")[0]
            for text in installed.requires or ():
                child = Requirement(text)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    queue.append(child)
    return found


def main() -> None:
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [text for name in ("formats", "serve", "tensorboard", "vision", "dev") for text in extras[name]]
    print("# Exact versions for `make`; written by `make lock`. Torch is installed first and alone: see the Makefile.")
    for name, version in sorted(closure(wanted).items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
