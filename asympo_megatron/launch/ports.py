"""TCP ports on this machine."""

import socket

from asympo_megatron.errors import ConfigError


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now. Another process may still take it first: the role then says so and the run stops."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_host(host: str, key: str) -> None:
    """Refuse a host that no role of this machine can listen on.

    Raises:
        ConfigError: naming the configuration key to change.
    """
    try:
        free_port(host)
    except OSError as error:
        raise ConfigError(
            f"{key} is {host!r}, where nothing on this machine can listen ({error.strerror}). Set it to 127.0.0.1, or "
            "to another IPv4 address or name of this machine."
        ) from error


def check_port(host: str, port: int, key: str) -> None:
    """Refuse a port that is taken.

    Raises:
        ConfigError: naming the configuration key to change.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be bound ({error.strerror}). "
                f"Set {key} to another port, or to 0 for any free one."
            ) from error
