import pytest
from measured_rows import Rows, make_rows


@pytest.fixture
def rows() -> Rows:
    return make_rows()
