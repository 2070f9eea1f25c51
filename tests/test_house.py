"""The structure of the code, checked by machine; each rule was seen to find a planted violation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from megaswift.config.options import DeployArguments, EvalArguments, ExportArguments, InferArguments, SftArguments

SOURCE = Path(__file__).parent.parent / "src" / "megaswift"

# Rooms; later ones may import earlier ones. What only a type checker reads is no import.
ORDER = [
    "errors", "terminal", "store", "launch", "report", "config", "models", "weights", "hub", "data", "run", "megatron", "train",
    "proof", "export", "parity", "inference", "evaluation", "commands", "cli",
]  # fmt: skip
# Packages that take long to import: a module of ours is imported within a function only where it would bring one of them.
HEAVY = frozenset(
    "torch transformers megatron datasets matplotlib jinja2 numpy tensorboard yaml gguf safetensors huggingface_hub modelscope vllm "
    "evalscope lm_eval fastapi uvicorn cryptography pyarrow tokenizers rich triton".split()
)
# Modules of ours that `swift sft` can reach, its only rank in this process included; those that a step on a rank can; the
# aims are 60 and 30, and they only fall, but for adapters and 4 bits, which brought a dozen, and for
# experts, which brought ten; adapters of experts, and those that begin as a part of the base, brought one each, layers of other
# kinds three, linear attention five, gpt-oss three, preferences seven, loss rules and what inference sees one each; whole models, what is
# carried along and stacked experts one each, text nine, heads of scores eight, plans nine.
REACH = {"megaswift.commands.sft": 234, "megaswift.train.loop": 155, "megaswift.train.trainer": 77}


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read(node: ast.AST) -> Iterator[ast.AST]:
    """A tree without what only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from read(child)


def targets(node: ast.AST) -> list[str]:
    """Modules of ours that an import statement may mean."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megaswift":
        return [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "megaswift"]
    return []


def imports_of(text: str, known: dict[str, Path]) -> set[str]:
    """Names of our modules that a file imports anywhere, functions included."""
    return {name for node in read(ast.parse(text)) for name in targets(node) if name in known} - {"megaswift"}


def wrong_ways(name: str, text: str, known: dict[str, Path]) -> list[str]:
    """Imports of a room that comes later."""
    found = sorted(imports_of(text, known))
    return [f"{name} imports {target}" for target in found if ORDER.index(room(target)) > ORDER.index(room(name))]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_imports_flow_one_way() -> None:
    known = modules()
    names = [name for name in known if name not in ("megaswift", "megaswift.__main__")]
    wrong = [line for name in names for line in wrong_ways(name, known[name].read_text(encoding="utf-8"), known)]
    assert not wrong, "\n".join(wrong)
    planted = "def f():\n    from megaswift.train import loop\nif TYPE_CHECKING:\n    from megaswift.cli import main\n"
    assert wrong_ways("megaswift.data.chat", planted, known) == [
        "megaswift.data.chat imports megaswift.train",
        "megaswift.data.chat imports megaswift.train.loop",
    ]


def reached(entry: str, texts: dict[str, str]) -> set[str]:
    known = {name: Path() for name in texts}
    seen: set[str] = set()
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports_of(texts[name], known)
    return seen


def test_what_training_reaches() -> None:
    """Every import counts, lazy ones too."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    for entry, most in REACH.items():
        assert len(reached(entry, texts)) <= most, entry
        more = texts | {
            "megaswift.run.spec": texts["megaswift.run.spec"] + "\n\ndef f():\n    from megaswift.commands import eval\n"
        }
        assert len(reached(entry, more)) > most, entry


class Weights:
    """What importing each module brings of the heavy packages."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.trees = {name: ast.parse(text) for name, text in texts.items()}
        self.own: dict[str, set[str]] = {}
        self.direct: dict[str, set[str]] = {}
        for name, tree in self.trees.items():
            top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            others = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
            others += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
            self.own[name] = {other.split(".")[0] for other in others} & HEAVY
            self.direct[name] = {part for node in top for target in targets(node) for part in self.with_packages(target)}

    def with_packages(self, name: str) -> list[str]:
        parts = name.split(".")
        return [part for k in range(2, len(parts) + 1) if (part := ".".join(parts[:k])) in self.trees]

    def of(self, name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            one = waiting.pop()
            if one in self.trees and one not in seen:
                seen.add(one)
                waiting += self.direct[one]
        return set().union(*(self.own[one] for one in seen)) if seen else set()

    def needlessly_lazy(self) -> list[str]:
        """Imports of ours within functions that could stand at the top without bringing a heavy package."""
        found = []
        for name, tree in self.trees.items():
            if name in (
                "megaswift",
                "megaswift.cli",
            ):  # the public names, and the verbs: nothing is imported until it is asked for
                continue
            nodes = {
                node
                for part in ast.walk(tree)
                if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
                for node in ast.walk(part)
            }
            for node in nodes:
                brought = {heavy for target in targets(node) for part in self.with_packages(target) for heavy in self.of(part)}
                if targets(node) and brought <= self.of(name):
                    found.append(f"{name}: {ast.unparse(node)}")
        return sorted(found)


def test_imports_in_functions_have_a_reason() -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    assert Weights(texts).needlessly_lazy() == []
    texts["megaswift.run.plan"] += "\n\ndef f():\n    from megaswift.store.cache import cache_root\n"
    assert Weights(texts).needlessly_lazy() == ["megaswift.run.plan: from megaswift.store.cache import cache_root"]


def hidden_imports(text: str) -> list[str]:
    """Code in strings that imports the product: nobody finds it who moves a module. Docstrings are for people."""
    tree = ast.parse(text)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]
    return [value for value in strings if re.search(r"\b(import megaswift|from megaswift[\w.]* import)\b", value)]


def test_no_import_hides_in_a_string() -> None:
    found = {name: hidden_imports(path.read_text(encoding="utf-8")) for name, path in modules().items()}
    assert not {name: strings for name, strings in found.items() if strings}
    assert hidden_imports('"""from megaswift.cli import main"""\nx = "from megaswift.cli import main; main()"') == [
        "from megaswift.cli import main; main()"
    ]


def kind_questions(text: str) -> list[str]:
    """Questions of what kind an arrangement or a parameter is: what depends on it belongs into its methods."""
    calls = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    ]
    return [
        ast.unparse(call)
        for call in calls
        if re.search(r"\b(Arrangement|Piece|Parameter|HFTensor)\b", ast.unparse(call.args[1]))
        and "torch" not in ast.unparse(call.args[1])
    ]


def test_only_models_ask_what_an_arrangement_is() -> None:
    found = [
        (name, kind_questions(path.read_text(encoding="utf-8"))) for name, path in modules().items() if room(name) != "models"
    ]
    assert not [pair for pair in found if pair[1]]
    assert kind_questions("if isinstance(x.arrangement, Arrangement): pass") == ["isinstance(x.arrangement, Arrangement)"]


def private_names_of_others(name: str, text: str) -> list[str]:
    """Names with an underscore that a module takes from a module of another room."""
    found, theirs = [], set()

    def private(part: str) -> bool:
        return part.startswith("_") and not part.startswith("__")

    def foreign(module: str) -> bool:
        return module.startswith("megaswift.") and room(module) != room(name)

    nodes = list(ast.walk(ast.parse(text)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megaswift":
            for alias in node.names:
                if foreign(f"{node.module}.{alias.name}"):
                    theirs.add(alias.asname or alias.name)
                    found += [f"{name} imports {alias.name} of {node.module}"] if private(alias.name) else []
        elif isinstance(node, ast.Import):
            theirs |= {alias.asname or alias.name for alias in node.names if foreign(alias.name)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in theirs:
            found.append(f"{name} uses {ast.unparse(node)}")
    return found


def test_private_names_stay_in_their_room() -> None:
    found = [use for name, path in modules().items() for use in private_names_of_others(name, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_a_private_name_of_another_room_is_seen() -> None:
    text = """import megaswift.train.loop as their
from megaswift.commands import sft
from megaswift.megatron.kernels.rope import _own, rotate
from megaswift.parity.rank import _step
def run(): return sft._plan, their._restored(1), rotate._cache, self._x, sft.__name__
"""
    assert sorted(private_names_of_others("megaswift.parity.command", text)) == [
        "megaswift.parity.command imports _own of megaswift.megatron.kernels.rope",
        "megaswift.parity.command uses rotate._cache",
        "megaswift.parity.command uses sft._plan",
        "megaswift.parity.command uses their._restored",
    ]


# Where the class of an object of Megatron-Core's may be exchanged, and its private names used: each with its reason there.
PATCHES = "megaswift.megatron.compat"
ADAPTERS = "megaswift.megatron.lora_layers"  # the one place that attaches adapters exchanges classes, too
# Names with an underscore that others have no public form of, by module. Torch's operators are among them, `os._exit` is public.
UNDERSCORED = {
    "megaswift.weights.torch_dist.writer": {"_StorageInfo"},  # what torch's own index holds
    "megaswift.weights.hf.unpickle": {"_Unpickler"},  # the one written in Python, which can be told what to build
    "megaswift.proof.streams": {"_parameters"},  # of a module, in place of which others are put
    "megaswift.megatron.kernels.activation_offload": {"_version"},  # how often a tensor was changed in place
    "megaswift.megatron.kernels.flash_attention_4": {"_flash_attn_fwd", "_flash_attn_bwd"},  # without autograd around them
    "megaswift.data.hubs": {"_fingerprint"},  # of a dataset, by which it is cached
    "megaswift.evaluation.evalscope_scorer": {"_benchmark_meta", "_temporary_attribute"},  # what its own evaluator asks
}


def patches(name: str, text: str) -> list[str]:
    """Exchanges of a class, and private names of third parties. What a class says of itself and its parent is its own."""
    tree, found = ast.parse(text), []
    nodes = list(ast.walk(tree))
    ours = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    ours |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    ours |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    ours -= {method.name for kind in nodes if isinstance(kind, ast.ClassDef) for method in kind.body if overrides(kind, method)}

    def theirs(attribute: str) -> bool:
        return attribute.startswith("_") and not attribute.startswith("__") and attribute not in UNDERSCORED.get(name, ())

    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "megaswift":
            found += [f"{name} imports {alias.name}" for alias in node.names if theirs(alias.name)]
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr == "__class__" and isinstance(node.ctx, ast.Store) and name != ADAPTERS:
            found.append(f"{name} sets {ast.unparse(node)}")
        owner = ast.unparse(node.value)
        operators = owner in ("torch", "torch.ops.aten") or (owner, node.attr) == ("os", "_exit")
        if theirs(node.attr) and node.attr not in ours and owner not in ("self", "cls", "super()") and not operators:
            found.append(f"{name} uses {ast.unparse(node)}")
    return [] if name == PATCHES else found


def overrides(kind: ast.ClassDef, method: ast.stmt) -> bool:
    """Whether a method asks its parent for the same: it is the parent's name then."""
    return isinstance(method, ast.FunctionDef) and f"super().{method.name}(" in ast.unparse(method)


def test_patches_of_others_stand_in_one_place() -> None:
    found = [line for name, path in modules().items() for line in patches(name, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_a_patch_elsewhere_is_seen() -> None:
    text = """from torch.optim import _secret
class Ours(Theirs):
    def _state(self, key): return super()._state(key)
    def _own(self): return self._hidden
    def value(self, other): return other._own()
def use(ddp, block):
    block.__class__ = Ours
    torch._foreach_norm(block._state(1))
    return ddp._hook(), type(block).__class__
"""
    assert sorted(patches("megaswift.megatron.graphs", text)) == [
        "megaswift.megatron.graphs imports _secret",
        "megaswift.megatron.graphs sets block.__class__",
        "megaswift.megatron.graphs uses block._state",
        "megaswift.megatron.graphs uses ddp._hook",
    ]
    assert patches(PATCHES, text) == []


def dtype_tables(text: str) -> list[str]:
    """Dictionaries that say which torch dtype a name means."""
    tables = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Dict)]
    named = re.compile(r"torch\.(b?float|u?int)\d+\w*")
    return [ast.unparse(node) for node in tables if sum(bool(named.fullmatch(ast.unparse(v))) for v in node.values) > 1]


def test_number_formats_stand_in_one_table() -> None:
    """weights/dtypes.py, and beside it the torch dtypes by the same names."""
    found = {name: dtype_tables(path.read_text(encoding="utf-8")) for name, path in modules().items()}
    assert not {name: tables for name, tables in found.items() if tables}
    assert dtype_tables("x = {'bf16': torch.bfloat16, 'fp32': torch.float32}") == [
        "{'bf16': torch.bfloat16, 'fp32': torch.float32}"
    ]


def test_pages_are_made_by_one_kit() -> None:
    """report/html.py escapes and has the style."""
    makers = {
        name
        for name, path in modules().items()
        if re.search(r"<style|^import html$|^from html import", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert makers == {"megaswift.report.html"}


def locks_and_renames(text: str) -> set[str]:
    """Calls by which a file or directory gets its name, and locks."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    wanted = ("flock", "lockf", "rename", "renames", "mkstemp", "mkdtemp")
    return {call for call in calls if call.split(".")[-1] in wanted or call == "os.replace"}


def test_one_way_to_appear_whole_and_one_lock() -> None:
    """store/publish.py names, store/lock.py locks; store/retention.py takes names away."""
    found = {name: locks_and_renames(path.read_text(encoding="utf-8")) for name, path in modules().items()}
    assert {name: calls for name, calls in found.items() if calls} == {
        "megaswift.store.lock": {"fcntl.flock"},
        "megaswift.store.publish": {"os.replace", "os.rename"},
        "megaswift.store.retention": {"path.rename"},
    }
    planted = "temporary.rename(target)\nfcntl.flock(f, 2)\nos.replace(a, b)\ntext.replace('a', 'b')"
    assert locks_and_renames(planted) == {"temporary.rename", "fcntl.flock", "os.replace"}


def test_every_room_is_in_the_order() -> None:
    assert {room(name) for name in modules()} - {"megaswift", "__main__"} == set(ORDER)


def readers_of_options(texts: dict[str, str]) -> dict[str, set[str]]:
    """Each option that training alone has -> the modules outside commands/ that declare or read it."""
    own = {item.name for item in fields(SftArguments)}
    for others in (ExportArguments, InferArguments, DeployArguments, EvalArguments):
        own -= {item.name for item in fields(others)}
    found: dict[str, set[str]] = {name: set() for name in own}
    for module, text in texts.items():
        if room(module) == "commands":
            continue
        for name in own:
            if re.search(rf"\bargs\.{name}\b|^    {name}: .*= option\(", text, re.MULTILINE):
                found[name].add(module)
    return found


def test_an_option_is_read_in_few_places() -> None:
    """Its declaration, its resolution, and what cannot do without the wish itself; everything else takes its part of a Run."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    found = readers_of_options(texts)
    assert len(found) > 50 and all(found.values()), [name for name, where in found.items() if not where]
    assert {name: sorted(where) for name, where in found.items() if len(where) > 4} == {}
    for module in ("train.loop", "train.trainer", "megatron.model", "train.saving"):
        texts[f"megaswift.{module}"] += "\n\ndef planted(args):\n    return args.fp8\n"
    assert len(readers_of_options(texts)["fp8"]) > 4


def test_four_files_from_the_command_to_the_step() -> None:
    """cli -> commands/sft -> train/loop -> train/trainer: each names the next."""
    chain = ["cli", "commands/sft", "train/loop", "train/trainer"]
    for here, there in zip(chain, chain[1:]):
        assert f"megaswift.{there.replace('/', '.')}" in (SOURCE / f"{here}.py").read_text(encoding="utf-8"), (
            f"{here} does not lead to {there}"
        )


def test_every_file_says_what_it_is() -> None:
    for name, path in modules().items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, megaswift.cli; megaswift.cli.main(['sft', '--help']); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "megaswift", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    assert min(times) < 1.0
