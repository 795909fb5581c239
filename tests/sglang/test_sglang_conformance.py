"""The conformance suite of tests/engine, unchanged, against a real SGLang server."""

from test_engine_collective import *  # noqa: F403
from test_engine_colocated import *  # noqa: F403
from test_engine_conformance import *  # noqa: F403
from test_engine_mirrored import *  # noqa: F403
from test_engine_updates import *  # noqa: F403
