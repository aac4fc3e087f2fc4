"""An embedded NATS server: it carries calls between the processes of one machine, without an installation."""

from mercato.embedded_nats.server import EmbeddedNats, NatsUser, authorization

__all__ = ["EmbeddedNats", "NatsUser", "authorization"]
