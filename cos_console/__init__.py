"""cos-console: finds cOS installations and takes them safely through upgrade, repair and rollback."""

__version__ = "0.1.0"
