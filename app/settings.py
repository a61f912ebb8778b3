"""Every setting of the service: read once from the environment (prefix TISSUE_), checked, then passed on.

A variable that no setting answers to is an error, since a typing mistake would otherwise pass unnoticed.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model.artifact import Device, Precision

PREFIX = "TISSUE_"
CLIENT_KEY = "TISSUE_API_KEY"  # what `tissue predict` sends: no setting of the service
MOST_MEGAPIXELS = 178  # where Pillow itself stops
SHIPPED_ARTIFACT = Path(__file__).parent.parent / "model" / "default"

_KUBERNETES = (
    "Kubernetes adds such variables to every pod beside a Service named 'tissue': "
    "set `enableServiceLinks: false` in the pod, or give the Service another name"
)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        validate_default=False,
        hide_input_in_errors=True,  # keys are among it
    )

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on. 0.0.0.0 means every network of the machine."
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one and logs it.")
    artifact: Path = Field(
        SHIPPED_ARTIFACT, description="Directory of the artefact to serve: manifest.json and its graphs."
    )
    device: Literal["auto", Device] = Field(
        "auto",
        description="`cuda` refuses to start without a working GPU, `auto` uses one that works, `cpu` never does.",
    )
    precision: Literal["auto", Precision] = Field(
        "auto",
        description="Graphs to run: `fp32`, `int8`, or `fp16`, which the shipped artefact has not; `auto` means fp32.",
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Most tiles in one model call; int8 always takes 1. Unset: 1 on a CPU, where more gain little; "
        "32 on a GPU.",
    )
    max_queue: int = Field(
        256,
        ge=1,
        le=65536,
        description="Most tiles that may wait for the model; beyond it requests get 503 with Retry-After.",
    )
    deadline_ms: int = Field(
        10_000,
        ge=1,
        le=600_000,
        description="Time from the last byte of a request to its answer, in milliseconds; then it gets 504.",
    )
    drain_ms: int = Field(
        2_000,
        ge=0,
        le=600_000,
        description="Milliseconds after SIGTERM in which it still listens, but reports not ready and answers new work "
        "with 503, so that load balancers notice; accepted requests keep their deadline.",
    )
    max_body_mib: float = Field(32, ge=0.001, le=4096, description="Largest request body, in MiB.")
    max_megapixels: float = Field(
        50,
        gt=0,
        le=MOST_MEGAPIXELS,
        description=f"Largest picture, in millions of pixels; Pillow itself stops at {MOST_MEGAPIXELS}.",
    )
    decode_threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Threads that decode large pictures, and as many for small ones and overlays. Unset: one per "
        "granted core.",
    )
    infer_threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Model calls at a time. Unset: as many as granted cores (shared among the workers), 1 on a GPU.",
    )
    intra_threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Threads inside a lone model call; calls side by side have one each. Unset: all granted cores.",
    )
    workers: int = Field(
        1, ge=1, le=256, description="Processes that share the port. More than 1 costs memory for each."
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Comma-separated keys. When set, POST routes, /model and /metrics ask for one of them."
    )
    api_keys_file: Path | None = Field(
        None, description="File with one key per line, read at startup, in addition to those of TISSUE_API_KEYS."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated origins whose pages may call the service, e.g. https://viewer.example.",
    )
    log_format: Literal["json", "text"] = Field("text", description="Log lines on stderr: `text` or `json`.")

    # Read once: a worker that is started anew must not find the file emptied, and the door open.
    _keys_of_file: frozenset[str] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_variables(cls, values: Any) -> Any:
        refuse_unknown_variables(os.environ)
        return values

    @field_validator("port", mode="before")
    @classmethod
    def _explain_kubernetes_port(cls, port: Any) -> Any:
        if isinstance(port, str) and "://" in port:
            raise ValueError(f"TISSUE_PORT is {port!r}, expected a number. {_KUBERNETES}")
        return port

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_keys", mode="after")
    @classmethod
    def _refuse_no_key(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not keys:  # a secret that came out empty must not leave the door open
            raise ValueError("TISSUE_API_KEYS is set but holds no key; give one, or unset it")
        if not all(key.get_secret_value().isprintable() for key in keys):
            raise ValueError("a key of TISSUE_API_KEYS isn't UTF-8, or holds what no header can carry, as a line break")
        return keys

    @field_validator("cors_origins", mode="after")
    @classmethod
    def _refuse_what_is_no_origin(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin, such as https://viewer.example: a scheme, no path, no slash"
                )
        return origins

    @model_validator(mode="after")
    def _read_keys_file(self) -> "Settings":
        if self.api_keys_file is not None:
            self._keys_of_file = read_keys_file(self.api_keys_file)
            if not self.read_keys():
                raise ValueError(
                    f"{self.api_keys_file} holds no key; write one per line, "
                    "or leave --api-keys-file (TISSUE_API_KEYS_FILE) out"
                )
        return self

    def read_keys(self) -> frozenset[str]:
        """All keys that open the guarded routes; empty means that none is asked for."""
        listed = {key.get_secret_value() for key in self.api_keys}
        return frozenset(listed | (self._keys_of_file if self.api_keys_file else set()))

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mib * 2**20)


def read_keys_file(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()  # editors on Windows put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}, which --api-keys-file (TISSUE_API_KEYS_FILE) names, can't be read as UTF-8 text: {error}"
        ) from error
    keys = frozenset(line.strip() for line in lines if line.strip())
    if not all(key.isprintable() for key in keys):
        raise ValueError(f"a key in {path} holds what no header can carry")
    return keys


def refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known | {CLIENT_KEY}:
            raise ValueError(explain_unknown(name, known))


def explain_unknown(name: str, known: set[str]) -> str:
    if name.startswith(("TISSUE_SERVICE_", "TISSUE_PORT_")):
        return f"no setting is called {name}. {_KUBERNETES}"
    nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)[0]
    return f"no setting is called {name}; the nearest is {nearest}. Correct or unset it"
