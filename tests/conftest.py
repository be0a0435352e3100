import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True, scope="session")
def one_blas_thread():
    """BLAS threads spin while they wait; on the tests' small matrices they only disturb."""
    with threadpool_limits(1, user_api="blas"):
        yield
