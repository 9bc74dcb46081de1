"""The house keeps its floors: a file imports only from lower layers, and every file has a layer."""

import ast
import re
from pathlib import Path

SRC = Path(__file__).parent.parent / "src"
LAYERS = {
    0: "config profiles stages labels verified_folders artifacts environment precision progress",
    1: "sources source_locations file_formats hub_datasets sample_data sample_newsroom sample_lexicon cleaning deduplication word_ngrams "
    "overlap splits tokenizer word_list span_corruption packing attention gpu_kernels fast_attention chunked_attention triton_attention "
    "triton_kernels triton_loss norm dropout fused_loss",
    2: "pretraining_dataset finetuning_dataset distant_supervision collators pretraining_batches finetuning_batches t5_layers "
    "t5_stack input_checks modeling_t5 kv_cache slim_attention slim_generation",
    3: "initialisation optimizers compilation cuda_graphs gradients checkpoints interruption training_bar training pretraining "
    "inspection qlora inference adaptation finetuning finetuned_checkpoints calibration evaluation error_analysis baselines "
    "cross_validation "
    "comparison_report display",
    4: "predict pretrain compare pipeline",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}


def modules():
    return {path.relative_to(SRC).with_suffix("").parts: path for path in SRC.rglob("*.py") if path.name != "__init__.py"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "src":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("src."))


def test_every_module_has_a_layer_and_every_layer_its_modules():
    """A new file without a layer would escape the rule below."""
    assert {parts[0] for parts in modules()} == set(LAYER_OF)


def test_the_readme_shows_the_layers():
    """A map that is out of date sends a stranger to the wrong room."""
    rows = re.findall(r"^\| (\d) \| (.*) \|$", (SRC.parent / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(layer): set(re.findall(r"`(\w+)`", names)) for layer, names in rows} == {k: set(v.split()) for k, v in LAYERS.items()}


def test_imports_go_down():
    """An upward import makes a cycle sooner or later, and the order in which to read the code is lost."""
    for parts, path in modules().items():
        for imported in imported_modules(path):
            assert LAYER_OF[imported] <= LAYER_OF[parts[0]], f"{path.name} imports {imported} from a higher layer"


def test_same_layer_imports_have_no_cycle():
    """Files of one layer may use each other in one direction only."""
    graph = {parts[0]: set() for parts in modules()}
    for parts, path in modules().items():
        graph[parts[0]] |= {name for name in imported_modules(path) if name != parts[0]}
    visited, stack = set(), []

    def visit(name):
        assert name not in stack, f"import cycle: {' -> '.join([*stack, name])}"
        if name in visited:
            return
        stack.append(name)
        for below in graph[name]:
            visit(below)
        visited.add(stack.pop())

    for name in graph:
        visit(name)
