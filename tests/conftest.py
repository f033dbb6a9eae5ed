"""Before anything of nsa is imported: shape checks, one seed, two threads, reproducible hypothesis."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Every annotated shape of the library is checked while the tests run.
install_import_hook("nsa", "beartype.beartype")

settings.register_profile(
    "reproducible",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("reproducible")

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded, for the input families."""
    return torch.Generator().manual_seed(0)
