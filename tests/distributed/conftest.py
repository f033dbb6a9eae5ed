"""One process imports for all cases that need nothing but several processes."""

import groups
import pytest


@pytest.fixture(scope="session")
def together() -> dict[str, str]:
    """ "case/processes" -> what went wrong."""
    return groups.run("context_cases", "tensor_cases", "scale_cases")
