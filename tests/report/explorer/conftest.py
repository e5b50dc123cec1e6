import pytest
from explored import toy_sweep

from stabilitykit.records.sweep import Results


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return toy_sweep(tmp_path_factory.mktemp("sweep"))
