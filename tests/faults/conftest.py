"""What all fault tests compare with: data, and the weights of a run that nothing hit."""

from __future__ import annotations

import pytest

from crate_ray.config import PrepareConfig
from crate_ray.data.builtin import digits_source
from crate_ray.data.packing import pack
from crate_ray.data.storage import open_storage
from tests.faults.runs import pretrain
from tests.jobs import final_weights, finish, start


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", split="test", output=str(tmp_path_factory.mktemp("digits")))
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    return config.output


@pytest.fixture(scope="session")
def undisturbed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(pretrain(digits), folder), folder)
    return final_weights(folder / "runs" / "run")
