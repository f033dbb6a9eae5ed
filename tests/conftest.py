"""Before anything of nsa is imported: shape checks, one seed, one thread, reproducible hypothesis."""

import ast
from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook
from jaxtyping._import_hook import JaxtypingTransformer

_check = JaxtypingTransformer.visit_FunctionDef


def _check_unless_inner(transformer: JaxtypingTransformer, node: ast.FunctionDef) -> ast.FunctionDef:
    """A function inside another is made at every call, and its checks compiled every time: milliseconds each."""
    inner = any(isinstance(parent, ast.FunctionDef) for parent in transformer._parents)
    return node if inner else _check(transformer, node)


JaxtypingTransformer.visit_FunctionDef = _check_unless_inner

# Every annotated shape of the library is checked while the tests run (Hugging Face's dataclasses do not bear it).
CHECKED = ("cache", "config", "functional", "modules", "ops", "shapes", "testing")
install_import_hook([f"nsa.{name}" for name in CHECKED], "beartype.beartype")

settings.register_profile(
    "reproducible",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("reproducible")

torch.set_num_threads(1)  # tests are small; waiting for a second thread costs more than it gives


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=0, help="cases of each fuzzer, instead of its own few")
    parser.addoption("--first-case", type=int, default=0, help="the number of the first of them")
    parser.addoption("--requests", type=int, default=200, help="requests to the engine that loses no block, of vLLM's")


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Callable[[int], range]:
    """cases(default): the numbers of the cases that a fuzzer tries, `--cases` of them if that was given."""
    asked, first = request.config.getoption("--cases"), request.config.getoption("--first-case")
    return lambda default: range(first, first + (asked or default))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded, for the input families."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """As users run the library: its own error messages, not the shape checker's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
