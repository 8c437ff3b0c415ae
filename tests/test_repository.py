"""The files around the library say the same thing, and what they promise is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(text_of("pyproject.toml"))["project"]


def test_environment_yml_installs_what_pyproject_says():
    environment = yaml.safe_load(text_of("environment.yml"))
    python, pip, packages = environment["dependencies"]
    assert python.replace(" ", "") == "python" + PROJECT["requires-python"]
    assert pip == "pip"
    extras = ",".join(sorted(PROJECT["optional-dependencies"]))
    assert packages == {"pip": ["-c constraints.txt", f"-e .[{extras}]"]}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    "system", [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64")]
)
def test_every_dependency_is_pinned(python, system):
    place = dict(zip(("platform_system", "platform_machine"), system, strict=True))
    place |= {"python_version": python, "python_full_version": f"{python}.0"}

    def at_this_place(lines):
        requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
        chosen = [r for r in requirements if r.marker is None or r.marker.evaluate(place)]
        return {canonicalize_name(r.name): r for r in chosen}

    pins = at_this_place(text_of("constraints.txt").splitlines())
    wanted = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    for name, requirement in at_this_place(wanted).items():
        (pin,) = pins[name].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier, name
    assert str(pins["torch"].specifier) == "==2.13.0"


def test_data_stays_small():
    size = sum(f.stat().st_size for f in (ROOT / "data").rglob("*") if f.is_file())
    assert size < 60e6


def test_every_picture_has_a_source():
    text = text_of("data/README.md") + text_of("data/images/scenes.json")
    for picture in (ROOT / "data" / "images").glob("*.*g"):
        assert picture.name in text


def test_readme_links_and_commands_exist():
    readme = text_of("README.md")
    for target in re.findall(r"\]\(([^)\s]+)\)", readme):
        if not target.startswith(("https://", "#")):
            assert (ROOT / target).exists(), target
    makefile = text_of("Makefile")
    for command in re.findall(r"`?make ([a-z-]+)", readme):
        assert re.search(rf"^{command}:", makefile, re.M), command


def test_readme_example_prints_what_it_says(capsys, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == re.search(r"# (.*)\n", code).group(1)


def test_ci_runs_the_readmes_command():
    script = text_of(".ci/run")
    assert re.search(r"^make test$", script, re.M)
    assert "\nmake test\n" in text_of("README.md")
