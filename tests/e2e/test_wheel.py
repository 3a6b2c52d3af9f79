"""The wheel in an environment of its own, outside of the checkout: recipes by name, and the smoke recipe runs."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = "--data.init_args.capture.model"
PARTS = ("kurtail_pl", "export", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment that has the wheel, and the packages that it needs from this one."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", place, source]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    environment = place / "environment"
    venv.create(environment, with_pip=False)
    (wheel,) = place.glob("*.whl")
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "kurtail"


def run(command: Path, place: Path, *arguments: object) -> str:
    found = subprocess.run(
        [command, *map(str, arguments)], cwd=place, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_recipes_are_listed_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "recipes")
    names = {path.stem for path in (ROOT / "configs").rglob("*.yaml")}
    assert names <= set(listed.split())
    code = "import kurtail_pl; print(kurtail_pl.__file__)"
    assert str(installed.parent.parent) in run(installed.parent / "python", tmp_path, "-c", code)


def test_the_smoke_recipe_runs(installed: Path, tied: Path, text_file: Path, tmp_path: Path) -> None:
    texts = [f"--{place}.text.source={text_file}" for place in ("data.init_args.capture", "evaluation")]
    run(installed, tmp_path, "fit", "--config", "smoke", f"{MODEL}={tied}", *texts)
    assert (tmp_path / "artifacts" / "smoke" / "results.json").is_file()
    assert (tmp_path / "artifacts" / "smoke" / "report.html").is_file()  # Its template is in the wheel.
    assert "capture" in run(
        installed, tmp_path, "plan", "--config", "kurtail-plus", "--config", "smoke", f"{MODEL}={tied}"
    )
