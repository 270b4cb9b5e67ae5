"""Settings from `CUTFLEET_*` environment variables; nothing else reads the environment. Credentials and region are
boto3's own (`AWS_*`). All invalid variables are reported at once; the Redis password never appears in logs or `repr`.

The README's table of settings is generated from this class.
"""

from __future__ import annotations

import base64
import os
import re
import socket
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.allowlist import Allowlist, parse_prefixes
from jobs.errors import SettingsError

PREFIX = "CUTFLEET_"


class Settings(BaseSettings):
    """Settings of every process. Build it with `load_settings()`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", protected_namespaces=())

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,
        description="Redis (7 or later) or Valkey for queues and ledger; `rediss://` for TLS, "
        "`sentinel://HOST/0?master_name=NAME;sentinel://...` for Sentinels. Must not evict (`noeviction`).",
    )
    s3_endpoint: str = Field("", description="S3 endpoint; empty for AWS.")
    source_endpoint: str = Field("", description="S3 endpoint of the sources, if another; `aws` for AWS.")
    source_profile: str = Field(
        "",
        description="AWS profile that reads the sources; empty: the credentials that write outputs.",
    )
    sources: str = Field(
        "",
        description="Prefixes that may be read, as `s3://photos/,s3://shop/new/`; each ends with `/`. Empty: any.",
    )
    destinations: str = Field(
        "", description="Prefixes where outputs may be written and read, in the same form. Empty: any."
    )
    model: str = Field("u2netp", description="Model that a worker loads: a preset, a directory or a weights file.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`cuda` without a GPU is an error.")
    gpu: int | None = Field(None, ge=0, description="Pins the worker to this GPU, before torch is imported.")
    node: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]*$")] = Field(
        "", description="Name of the worker before `@host`; empty: `gpuN`, or `cpu` with its process id."
    )
    slots: int = Field(
        0, ge=0, le=256, description="Most images in flight in a worker; 0: 24 with a GPU, else 2 per core."
    )
    batch_limit: int = Field(
        0, ge=0, le=64, description="Most images in one device batch; 0: 8 on a GPU, else 1 (`u2netp`: 1 per core)."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Precision of the model; `auto`: float16 on a GPU, float32 on a CPU."
    )
    compile: bool = Field(False, description="Compile the model with static shapes (`torch.compile`).")
    accept_licence: str = Field(
        "", description="`NAME:commercial-agreement` or `NAME:non-commercial`, where asked for."
    )
    trust_remote_code: bool = Field(False, description="Allow code from a model repository, with a pinned revision.")
    model_revision: str = Field("", description="The 40-digit revision of a model repository, where one is pinned.")
    max_pixels_mp: float = Field(100, gt=0, description="Larger images are refused before decoding (megapixels).")
    max_bytes_mb: float = Field(100, gt=0, description="Larger objects are refused before download (MB).")
    memory_mb: int = Field(
        0,
        ge=0,
        description="Resident memory (MB) above which a worker drains and exits with 0; also limits images in flight. "
        "0: three quarters of the machine's or container's memory, shared by its GPUs.",
    )
    lease_s: float = Field(
        60, ge=1, description="Lease on an image (seconds): a worker that stops renewing loses its images after it."
    )
    drain_s: float = Field(60, ge=1, description="Time after SIGTERM until a worker exits regardless (seconds).")
    max_tries: int = Field(8, ge=1, le=100, description="Attempts of an image before it is `failed`.")
    retry_base_s: float = Field(
        5, gt=0, description="Longest pause before the first retry (seconds); doubles each time up to 900, with jitter."
    )
    max_failed_share: float = Field(
        0.5, ge=0, le=1, description="A job with a larger share of failures is paused; 1: never."
    )
    keep_days: float = Field(7, gt=0, description="Days that Redis keeps a closed job. S3 keeps its files.")
    metrics_port: int = Field(0, ge=0, le=65_535, description="Port of `/metrics` of a worker or dispatcher; 0: off.")
    alive_file: str = Field(
        "", description="File that worker and dispatcher touch while they make progress, for probes."
    )
    webhook_secret: str = Field(
        "",
        repr=False,
        description="Key that signs webhooks: `whsec_` and 24 to 64 bytes in base64. Two, space-separated: both sign.",
    )
    webhook_private: bool = Field(False, description="Allow webhooks to private addresses and without TLS.")
    watch_token: str = Field(
        "", repr=False, description="Bearer token required from webhook senders to `cutfleet watch`."
    )
    api_keys: str = Field("", description="File with the HTTP API's keys and their rights, for `cutfleet serve`.")
    worker_usd: float = Field(
        3.0, ge=0, description="Price of a worker hour (USD); the default is near a cloud's price of an H100."
    )
    s3_write_usd: float = Field(
        0.005, ge=0, description="Price of 1,000 PUT or LIST requests (USD); default: S3 Standard, us-east-1."
    )
    s3_read_usd: float = Field(
        0.0004, ge=0, description="Price of 1,000 GET or HEAD requests (USD); default: S3 Standard, us-east-1."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Format of the logs on stderr: for people or for programs."
    )

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: str) -> str:
        if not re.match(r"^(redis|rediss|sentinel)://", url):
            raise ValueError("must start with redis://, rediss:// or sentinel://")
        if url.startswith("sentinel://") and not re.match(r"^[^;?]+\?master_name=[^;&]+(;sentinel://[^;]+)*$", url):
            raise ValueError("must be sentinel://HOST:26379/0?master_name=NAME;sentinel://OTHER:26379, all Sentinels")
        return url

    @field_validator("s3_endpoint", "source_endpoint")
    @classmethod
    def _endpoint_scheme(cls, url: str, info: ValidationInfo) -> str:
        if url == "aws" and info.field_name == "source_endpoint":
            return url
        if url and not re.match(r"^https?://[^/]+", url):
            raise ValueError("must be empty or start with http:// or https://")
        return url.rstrip("/")

    @field_validator("sources", "destinations")
    @classmethod
    def _prefixes(cls, text: str) -> str:
        parse_prefixes(text)
        return text

    @field_validator("webhook_secret")
    @classmethod
    def _webhook_secret(cls, text: str) -> str:
        for secret in text.split():
            try:
                size = len(base64.b64decode(secret.removeprefix("whsec_"), validate=True))
            except ValueError:
                size = 0
            if not secret.startswith("whsec_") or not 24 <= size <= 64:
                raise ValueError('must be "whsec_" and 24 to 64 bytes in base64: openssl rand -base64 32')
        return text

    @property
    def redis_name(self) -> str:
        """Return the Redis URL without its password, for logs and messages."""
        return re.sub(r"(://[^/@:]*):[^@]*@", r"\1:***@", self.redis_url)

    @property
    def s3_name(self) -> str:
        name = self.s3_endpoint or "AWS S3"
        if not self.has_own_source:
            return name
        source = "AWS S3" if self.source_endpoint == "aws" else self.source_endpoint or name
        return f"{name}, sources at {source}" + (f" as {self.source_profile}" if self.source_profile else "")

    @property
    def allowlist(self) -> Allowlist:
        return Allowlist(parse_prefixes(self.sources), parse_prefixes(self.destinations))

    @property
    def has_own_source(self) -> bool:
        """Whether sources are read from another store, or by another account, than outputs are written."""
        return bool(self.source_endpoint or self.source_profile)


def load_settings() -> Settings:
    """Read the environment. Raises `SettingsError` that names every invalid and every unknown `CUTFLEET_*` variable."""
    problems = [
        f"{name} is not a setting of this version"
        for name in sorted(os.environ)
        if name.startswith(PREFIX) and name[len(PREFIX) :].lower() not in Settings.model_fields
        if not name.startswith(f"{PREFIX}TEST_")
    ]
    try:
        settings = Settings()
    except ValidationError as exc:
        problems += [_describe(error["loc"], error["msg"], error.get("input")) for error in exc.errors()]
    if problems:
        raise SettingsError("; ".join(problems) + ". The README's table lists every setting.")
    return settings


def host_name() -> str:
    return socket.gethostname()


def _describe(loc: tuple[int | str, ...], problem: str, value: object) -> str:
    name = PREFIX + str(loc[0]).upper()
    field = Settings.model_fields.get(str(loc[0]))
    shown = "" if field is not None and not field.repr else f" (is {value!r})"
    return f"{name}: {problem.removeprefix('Value error, ')}{shown}"
