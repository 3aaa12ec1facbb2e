"""Find values in the user's own modules: `my_package.my_module:NAME` in a config is an import path.

Modules are found in the current folder, in the folders given to `search_in`, and on sys.path.
"""

import ast
import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from heedful.names import did_you_mean

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_HEEDFUL = Path(__file__).parent
_FOLDERS: dict[str, None] = {}
"""Further folders with modules, in order."""


class NotUsable(Exception):
    """Error: a file or a module of the user is missing or raises; the message has no traceback."""


def is_import_path(name: str) -> bool:
    """Tell if a name has the form of an import path, module:attribute."""
    return _IMPORT_PATH.fullmatch(name) is not None


def search_in(folder: Path) -> None:
    """Also find modules in this folder from now on, and in processes that are started later."""
    _FOLDERS[str(folder.absolute())] = None


def resolve(path: str, field: str, kind: type, error: type[Exception]) -> Any:
    """Return the value at an import path, the value of the config's `field`.

    Raises `error` if there is no such module or attribute, if the module raises, or if the value is
    not of type `kind`.
    """
    name, _, attribute = path.partition(":")
    try:
        module = load_module(name)
    except NotUsable as problem:
        raise error(f"{field} = {path}: {problem}") from None
    if not hasattr(module, attribute):
        place = getattr(module, "__file__", None) or "a folder without __init__.py"
        fix = did_you_mean(attribute, vars(module)).strip() or "correct the name"
        raise error(f"{field} = {path}: {name} ({place}) has no {attribute}; {fix}")
    value = getattr(module, attribute)
    if not isinstance(value, kind):
        wanted = f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind
        raise error(
            f"{field} = {path}: it is of type {type(value).__name__}, not {wanted}; give the "
            "import path of another value"
        )
    return value


def load_module(name: str) -> ModuleType:
    """Import a module; raise NotUsable if it is not found or raises."""
    if name in sys.modules:
        return sys.modules[name]
    with _importing(), _explained(f"module {name}"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # The module is found, and imports another one that is missing.
            places = ", ".join(_folders())
            known = [each.name for each in pkgutil.iter_modules(_folders())]
            fix = did_you_mean(name, known).strip()
            fix = fix or "correct the name, or run the command in the folder of the module"
            raise NotUsable(
                f"there is no module {error.name} in {places} or among the installed packages; "
                f"{fix}"
            ) from None


def load_file(path: Path) -> ModuleType:
    """Run a Python file as a module; raise NotUsable if it is missing or raises.

    Modules are found in its folder, too.
    """
    if not path.is_file():
        beside = [str(each) for each in path.parent.glob("*.py")]
        fix = did_you_mean(str(path), beside).strip() or "correct the path"
        problem = "it is a folder" if path.is_dir() else "there is no such file"
        raise NotUsable(f"{path}: {problem}; {fix}")
    search_in(path.parent)
    name = f"heedful_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with _importing(), _explained(str(path)):
        spec.loader.exec_module(module)
    return module


def call(function: Any, *arguments: Any) -> Any:
    """Call a function of the user; raise NotUsable, with file and line, if it raises."""
    with _importing(), _explained(getattr(function, "__name__", "the function")):
        return function(*arguments)


# Files, for the record of a run -------------------------------------------------------------------


def files(name: str) -> dict[str, Path]:
    """Return the files of an imported module and of all modules beside it that it imports, by name.

    Modules beside it are below the folder where Python found it. An installed package has only the
    file of the module itself.
    """
    root, found, waiting = _root(name), {}, [name]
    while waiting:
        each = waiting.pop()
        file = getattr(sys.modules.get(each), "__file__", None)
        if file is None or each in found or (each != name and not _is_beside(root, Path(file))):
            continue
        found[each] = Path(file)
        waiting += _imported(each, Path(file)) if _is_beside(root, Path(file)) else ()
    return dict(sorted(found.items()))


def sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file in hexadecimal; None: it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _root(name: str) -> Path:
    """Return the folder in which Python found the package of a module."""
    top = sys.modules[name.partition(".")[0]]
    if hasattr(top, "__path__"):
        return Path(next(iter(top.__path__))).parent
    return Path(str(top.__file__)).parent


def _is_beside(root: Path, file: Path) -> bool:
    is_ours = _HEEDFUL in file.parents
    return root in file.parents and "site-packages" not in file.parts and not is_ours


def _imported(name: str, file: Path) -> Iterator[str]:
    """Yield the names that may be modules in the imports of a file, and its packages."""
    yield from (name[:i] for i, character in enumerate(name) if character == ".")
    if file.suffix != ".py":
        return
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


# Errors in user code ------------------------------------------------------------------------------


def _folders() -> list[str]:
    return list(dict.fromkeys([str(Path.cwd()), *_FOLDERS]))


@contextmanager
def _importing() -> Iterator[None]:
    """Find modules first in our folders; afterwards last, so that they hide no installed package.

    The folders stay on sys.path for imports within functions and for processes that start later.
    """
    before, ours = list(sys.path), _folders()
    sys.path[:0] = ours
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = [*before, *(folder for folder in ours if folder not in before)]


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise NotUsable with the user's own file and line instead of any exception."""
    try:
        yield
    except NotUsable:
        raise
    except (Exception, SystemExit) as error:
        place = _place(error)
        fix = "; correct this line" if place and not _has_fix(error) else ""
        raise NotUsable(f"{place or what}: {_reason(error)}{fix}") from error


def _place(error: BaseException) -> str:
    """Return file and line of the deepest line of user code that raised the error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _is_users(file: str) -> bool:
    python = Path(importlib.__file__).parents[1]
    is_library = {_HEEDFUL, python} & set(Path(file).parents) or "site-packages" in file
    return not file.startswith("<") and not is_library


def _has_fix(error: BaseException) -> bool:
    """Tell if the text for an error names a fix already, as that of each error of heedful does."""
    return isinstance(error, SystemExit) or type(error).__module__.partition(".")[0] == "heedful"


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it ends the program; put its commands under if __name__ == '__main__'"
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return text if _has_fix(error) else f"{type(error).__name__}: {text}"
