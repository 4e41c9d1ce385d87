"""Configuration of the server. Free of torch, so that the command line can read it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """How `gr serve` takes requests."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all."""
    port: int = 8000
    """0: any that is free."""
    window_ms: float = 2.0
    """How long the first request of a batch waits for others."""
    max_batch: int = 64
    """Requests of one batch."""
    max_queue: int = 256
    """Requests that may wait; one more is refused with 429."""
    timeout_s: float = 10.0
    """How long a request may take; then it is answered with 504."""
    max_candidates: int = 20_000
    """Of one request, also of what is retrieved; more are refused with 422."""
    max_history: int = 20_000
    """Events of one request."""
    max_body_mb: float = 8.0
    """Of one request, MB (10^6 bytes); more are refused with 413."""
    cache_mb: float = 256.0
    """Memory for keys and values of users from one request to the next, MB (10^6 bytes), where the
    model allows it (docs/inference.md); 0: none."""
    faiss: str = ""
    """Description of a FAISS index in the place of the exact search; empty: exact."""
    tables: str = "fp32"
    """fp32: rows as they were trained, on the device; int4: in 4 bits, in host memory."""

    def __post_init__(self) -> None:
        for name, least in (
            ("port", 0),
            ("window_ms", 0),
            ("max_batch", 1),
            ("max_queue", 1),
            ("max_candidates", 1),
            ("max_history", 0),
        ):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least {least}, got {getattr(self, name)}")
        if self.port > 65_535:
            raise ValueError(f"--port must be at most 65535, got {self.port}")
        if self.tables not in ("fp32", "int4"):
            raise ValueError(f"--tables must be fp32 or int4, got {self.tables!r}")
        if not 0 <= self.cache_mb < float("inf"):
            raise ValueError(f"--cache-mb must be at least 0, got {self.cache_mb}")
        for name in ("timeout_s", "max_body_mb"):
            if not 0 < getattr(self, name) < float("inf"):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be positive, got {getattr(self, name)}")
