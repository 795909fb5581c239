"""Lets an unmodified SGLang be imported where its GPU packages do not exist.

SGLang imports GPU packages at module level that its CPU text path never calls. For those names, and only when a module
of sglang is the importer, a finder returns a stub; torch and transformers go on seeing them as absent. Stubs may be
named, subclassed and used as decorators while a module is being imported. Called at any other time, they raise.

A .pth file in the environment installs the finder in every Python process of it: SGLang's scheduler and detokenizer
are spawned, and need it too.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import types

STUBBED = frozenset(
    {
        *("IPython", "datasets", "interegular", "sentencepiece", "sgl_kernel", "soundfile"),
        *("tiktoken", "torchaudio", "torchvision", "triton", "watchfiles", "xxhash"),
    }
)
ABSENT = frozenset({"triton.knobs"})
"""Parts that sglang does without when they are not there, and would call if they were."""
VERSION = "3.9.0"
"""sglang compares triton's version at import."""


class StubCalledError(RuntimeError):
    """A package that is only a stub in this environment was really needed."""


def importing(frame):
    """Whether the frame runs the body of a module or class: only function bodies have optimized locals."""
    return not frame.f_code.co_flags & inspect.CO_OPTIMIZED


def refuse(name):
    raise StubCalledError(
        f"{name} was called, but this environment holds only a stub of that package: this feature of SGLang does not "
        "run on a CPU. Use a GPU environment for it."
    )


class StubClass:
    """Base of every stubbed class: a name for annotations and base classes. Making an instance raises."""

    def __new__(cls, *_, **__):
        if not importing(sys._getframe(1)):
            refuse(f"{cls.__module__}.{cls.__name__}")
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __class_getitem__(cls, item):
        return cls


class Stub(types.ModuleType):
    """A stubbed package, module or function; which one it is depends only on its use."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__file__ = __file__
        self.__version__ = VERSION
        self.__spec__ = importlib.machinery.ModuleSpec(name, StubLoader(), is_package=True)

    def __getattr__(self, name):
        full = f"{self.__name__}.{name}"
        if full in ABSENT or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"stub {self.__name__} has no {name}")
        if name[:1].isupper():
            value = type(name, (StubClass,), {"__module__": self.__name__})
        else:
            value = sys.modules.setdefault(full, Stub(full))
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        """`@stub` and `@stub(...)` at module level leave the decorated function a function that raises."""
        if not importing(sys._getframe(1)):
            refuse(self.__name__)
        if len(args) == 1 and not kwargs and inspect.isroutine(args[0]):
            return _unusable(args[0], self.__name__)
        return lambda function, *_: _unusable(function, self.__name__)


def _unusable(function, name):
    if not inspect.isroutine(function) or isinstance(function, _Unusable):
        return function

    return _Unusable(function, name)


class _Unusable:
    """A decorated function. `kernel[grid](...)`, as Triton launches one, raises as `kernel(...)` does."""

    def __init__(self, function, name):
        functools.update_wrapper(self, function)
        self._name = f"{name} {function.__qualname__}"

    def __call__(self, *args, **kwargs):
        refuse(self._name)

    def __getitem__(self, grid):
        refuse(self._name)


class StubLoader(importlib.abc.Loader):
    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


class StubFinder(importlib.abc.MetaPathFinder):
    """Last in line: a package that is really installed is never stubbed."""

    def find_spec(self, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        if top not in STUBBED or fullname in ABSENT:
            return None
        below_a_stub = "." in fullname and isinstance(sys.modules.get(top), Stub)
        if below_a_stub or _importer().startswith("sglang"):
            return importlib.machinery.ModuleSpec(fullname, StubLoader(), is_package=True)
        return None


def _importer():
    """Name of the module whose code asked for the import."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if not name.startswith(("importlib", "_frozen_importlib")):
            return name
        frame = frame.f_back
    return ""


def install():
    """Put the finder in place, once, and choose SGLang's CPU engine unless the environment says otherwise."""
    if not any(isinstance(finder, StubFinder) for finder in sys.meta_path):
        sys.meta_path.append(StubFinder())
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


install()
