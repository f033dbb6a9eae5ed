"""Who may import whom, read from the source, and what `import nsa` needs, tried out."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nsa

SOURCE = Path(nsa.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# From the bottom up: a part may import itself, the parts beside it and those before it.
LAYERS = [
    {"config", "files", "out_of_memory", "report"},
    {"shapes", "backend", "cache_tensors", "decode_step", "streams"},
    {"kernels"},
    {"ops"},
    {"composed"},
    {"functional", "decoding", "cache", "costs", "distributed", "methods"},
    {"modules"},
    {"models"},
    {"training", "eval", "serving", "bench", "adapting"},
    {"commands"},
    {"cli", "__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# What may be imported at the top of a file, besides the standard library; anything else waits inside a function.
CORE = {"torch", "jaxtyping"}
HUGGING_FACE = {"accelerate", "huggingface_hub", "numpy", "safetensors", "tokenizers", "transformers"}
COMMAND_LINE = {"rich", "tqdm", "tyro"}
THIRD_PARTY = {
    "kernels": CORE | {"triton"},
    "models": CORE | HUGGING_FACE,
    "training": CORE | HUGGING_FACE | COMMAND_LINE,
    "report": {"jinja2", "markupsafe", "matplotlib", "rich"},
    "eval": CORE | HUGGING_FACE | COMMAND_LINE | {"markupsafe"},
    "serving": CORE | HUGGING_FACE | COMMAND_LINE | {"httpx", "vllm"},  # the plug-in is loaded by vLLM
    "adapting": CORE | HUGGING_FACE | COMMAND_LINE,
    "bench": CORE | HUGGING_FACE | COMMAND_LINE,
    "commands": COMMAND_LINE,
    "cli": COMMAND_LINE,
}


def part_of(path: Path) -> str:
    """src/nsa/ops/combine.py -> ops, src/nsa/cache.py -> cache, src/nsa/__init__.py -> nsa."""
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "nsa" if first == "__init__" else first


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Every module that a file imports, whether at the top level of the file, and the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for_type_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in inside_functions and id(node) not in for_type_checkers
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_top, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                # `from nsa import ops` names a part; `from nsa.ops import combine` already does.
                yield f"nsa.{alias.name}" if node.module == "nsa" else str(node.module), at_top, node.lineno


def test_every_file_belongs_to_a_layer():
    assert {part_of(path) for path in FILES} <= {"nsa", "testing", *LEVEL}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downwards(path):
    part = part_of(path)
    for module, at_top, line in imports(path):
        where = f"{path.relative_to(SOURCE)}:{line} imports {module}"
        names = module.split(".")
        if names[0] == "nsa" and part == "nsa":
            assert not at_top, f"{where}; nsa/__init__.py imports on first use"
        elif names[0] == "nsa" and len(names) > 1:
            if part == "testing":
                assert names[1] in {"config", "testing"}, f"{where}; the oracle shares no code with what it judges"
            else:
                assert names[1] != "testing", f"{where}; only tests import nsa.testing"
                assert LEVEL[names[1]] <= LEVEL[part], f"{where}, a layer above {part}"
                measures = part in {"kernels", "bench"}  # bench loads what it measures once it knows of a device
                assert names[1] != "kernels" or measures or not at_top, f"{where} outside a function"
        elif names[0] not in sys.stdlib_module_names and at_top:
            assert names[0] in THIRD_PARTY.get(part, CORE), f"{where} at the top of a file of {part}"


def modules_of(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, type checkers' imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_no_import_goes_in_a_circle():
    """Not inside functions either: a file can be read once all that it imports has been."""
    names = {path: ".".join(("nsa", *path.relative_to(SOURCE).with_suffix("").parts)) for path in FILES}
    files = {name.removesuffix(".__init__"): path for path, name in names.items()}
    unread = {name: modules_of(path) & files.keys() - {name} for name, path in files.items()}
    for path in FILES:  # `from nsa.ops import decode` reads the package and the file
        name = names[path].removesuffix(".__init__")
        packages = {other for other in unread[name] if files[other].name == "__init__.py"}
        unread[name] -= {one for one in packages if any(other.startswith(f"{one}.") for other in unread[name])}
    while readable := [name for name, needs in unread.items() if not needs & unread.keys()]:
        for name in readable:
            del unread[name]
    assert not unread


# More is a sign that something has no object of its own. Kernels and their launchers are counted elsewhere.
MOST_PARAMETERS = 10
MORE_PARAMETERS = {
    "functional.native_sparse_attention": 17,  # public: FlashAttention's arguments and two more branches
    "models.twins._attend": 11,  # transformers' signature
}


def test_no_function_takes_more_than_ten_arguments():
    found = {}
    for path in FILES:
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "kernels" not in path.parts:
                names = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                number = len([name for name in names if name not in ("self", "cls", "ctx")])
                if number > MOST_PARAMETERS:
                    found[f"{module}.{node.name}"] = number
    more = {name: number for name, number in found.items() if number > MORE_PARAMETERS.get(name, MOST_PARAMETERS)}
    assert not more
    assert found.keys() == MORE_PARAMETERS.keys(), "some take fewer by now: take them off the list"


MOST_OF_KERNELS = 40
MORE_OF_KERNELS = {  # most of them sizes known when compiling
    "decode_split_kernel": 63,
    "decode_finish_kernel": 57,
    "decode_append_kernel": 48,
    "_compress": 44,  # a part of it
}


def test_no_kernel_takes_more_than_forty_arguments():
    """Tensors and strides that belong together are a tuple."""
    found = {}
    for path in (SOURCE / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
                found[node.name] = len(node.args.args)
    assert {name: number for name, number in found.items() if number > MOST_OF_KERNELS} == MORE_OF_KERNELS


def run(code: str) -> str:
    """Run Python code in a fresh interpreter, warnings as errors, and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE.parent, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_the_library_works_with_nothing_but_torch_and_jaxtyping():
    code = """
import sys

class Absent:
    names = {"transformers", "triton", "accelerate", "tokenizers", "tyro", "rich", "matplotlib", "safetensors"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import nsa
from nsa.cli import COMMANDS

config = nsa.NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=3)
q = torch.randn(1, 20, 2, 4)
print(list(nsa.native_sparse_attention(q, q, q, torch.ones(1, 20, 2, 3), config).shape))
layer = nsa.NativeSparseAttention(hidden_size=8, num_heads=2, num_kv_heads=1, config=config)
print(list(layer(torch.randn(1, 20, 8), cache=nsa.NSACache(config)).shape))
"""
    assert run(code) == "[1, 20, 2, 4]\n[1, 20, 8]"


def test_import_nsa_does_not_wait_for_torch():
    assert run("import sys, nsa; nsa.NSAConfig(); print('torch' in sys.modules)") == "False"


def test_nsa_offers_four_names_and_says_so_about_others():
    assert sorted(dir(nsa)) == sorted(["NSACache", "NSAConfig", "NativeSparseAttention", "native_sparse_attention"])
    with pytest.raises(AttributeError, match=r"^module 'nsa' has no attribute 'sparse_attention'$"):
        _ = nsa.sparse_attention
