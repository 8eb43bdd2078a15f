"""What installing the distribution promises."""

from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("package", ["stageflow_actors", "stageflow_brokers"])
def test_a_type_checker_may_trust_the_package(package: str) -> None:
    assert resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize("script", ["scripts/test", ".ci/run"])
def test_the_script_can_be_started_as_it_lies_there(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
