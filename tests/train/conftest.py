"""A short run that was left alone, for those that are damaged or stopped to be compared with."""

import gc

import pytest

from tests.train import small_run, small_store
from train.run import run


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("short")
    return small_run.short_run(small_store.write_store(str(place / "store")), str(place / "whole"))


@pytest.fixture(scope="session")
def whole(config):
    """Its folder."""
    run(config)
    return config.out


@pytest.fixture
def told_once(capfd):
    """What a failed read leaves behind complains when it is collected, or once its event loop is gone."""
    yield
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err
