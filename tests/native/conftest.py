import pytest

import falcon_jax as fj
from falcon_jax.native import library


@pytest.fixture(scope="package", autouse=True)
def built(tmp_path_factory):
    """Kernels that only these tests see, built once for all workers of a run."""
    shared = tmp_path_factory.getbasetemp().parent / "native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared))
        try:
            path = library.library_path()
            if not path.is_file():
                path = fj.native.build()
        except ValueError as error:
            if "no C++ compiler" not in str(error):
                raise
            pytest.skip(str(error))
        yield path


@pytest.fixture
def tiles(built):
    """A processor that multiplies bfloat16."""
    if not library.multiplies_bfloat16():
        pytest.skip("this processor has no AMX")
