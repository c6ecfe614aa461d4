"""AppConfig: one served model, and the reading and checking of the YAML files that Serve runs.

`python -m deployments.config FILE [KEY=VALUE ...]` checks a file without starting anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.caller import ApiKeys
from engine.config import EngineConfig, config_error
from engine.errors import ConfigError, MantaError
from engine.model_config import ModelConfig, resolve

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORT_PATH = "deployments.app:build"


class AutoscalingSection(BaseModel):
    """How many replicas to run, between two bounds, by the requests in flight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    initial_replicas: int | None = Field(None, ge=0)
    target_ongoing_requests: float = Field(64, gt=0)
    """Requests in flight each replica should carry."""
    upscale_delay_s: float = Field(30, ge=0)
    downscale_delay_s: float = Field(600, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self


class AppConfig(EngineConfig):
    """What a person sets for one application: the engine's keys, flat, and the server's."""

    served_model_name: str | tuple[str, ...] | None = None
    """What clients ask for as `model`; answers carry the first of several. None: the folder's or hub's name."""
    num_replicas: int = Field(1, ge=1)
    autoscaling: AutoscalingSection | None = None
    """Instead of num_replicas."""
    max_ongoing_requests: int | None = Field(None, ge=1)
    """Requests that Serve hands a replica at once; None: as many as may run and wait, and some to be refused."""
    max_waiting_requests: int = Field(1024, ge=1)
    """Requests without a first token that a replica holds; more are answered with 429 at once."""
    max_waiting_tokens: int = Field(1_000_000, ge=1)
    """Their prompt tokens together."""
    api_keys_file: str | None = None
    """Keys that clients must show, one a line, NAME=KEY; beside those of the variable MANTA_API_KEYS."""
    request_timeout_s: float | None = Field(None, gt=0)
    """A request that runs longer is aborted and answered with an error."""
    drain_timeout_s: float = Field(60.0, ge=0)
    """How long a replica that is told to stop finishes what it runs."""
    max_body_mib: float = Field(16.0, gt=0)
    """A larger request body is refused with 413."""

    @field_validator("model", "tokenizer", mode="after")
    @classmethod
    def _locate(cls, value: str | None) -> str | None:
        return value if value is None else locate(value)

    @model_validator(mode="after")
    def _covers_slots(self) -> Self:
        if self.max_ongoing_requests is not None and self.max_ongoing_requests < self.max_num_seqs:
            raise ValueError(f"max_ongoing_requests must be at least max_num_seqs ({self.max_num_seqs})")
        return self

    @property
    def engine(self) -> EngineConfig:
        """The engine's keys alone."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.model_fields})

    @property
    def names(self) -> tuple[str, ...]:
        """The names this model is served under, the main one first."""
        if self.served_model_name is None:
            folder = Path(self.model)
            return (folder.name if folder.is_dir() else self.model,)
        return (self.served_model_name,) if isinstance(self.served_model_name, str) else self.served_model_name

    @property
    def ongoing_requests(self) -> int:
        """What Serve may hold at one replica; above what may run and wait there, to refuse the rest at once."""
        return self.max_ongoing_requests or self.max_num_seqs + 2 * self.max_waiting_requests + 256


def locate(name: str) -> str:
    """The folder `name`, seen from the working directory or else from this repository; any other name as it is."""
    for base in (Path.cwd(), REPOSITORY):
        folder = base / Path(name).expanduser()
        if folder.is_dir():
            return str(folder.resolve())
    return name


def read_args(args: Mapping[str, Any]) -> AppConfig:
    """Validate one application's args. Strings stand for what YAML reads in them where a string is not allowed.

    Raises ConfigError naming the key, what came and what is allowed.
    """
    try:
        return AppConfig(**args)
    except ValidationError as error:
        faults = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
    # `serve run deployments.app:build KEY=VALUE` gives every value as a string.
    read = {key: yaml.safe_load(v) if key in faults and isinstance(v, str) else v for key, v in args.items()}
    try:
        return AppConfig(**read)
    except ValidationError as error:
        raise config_error(error, AppConfig) from None


def check(args: Mapping[str, Any]) -> AppConfig:
    """Validate one application's args as far as can be without loading weights.

    Raises ConfigError naming the key, what came and what is allowed.
    """
    config = read_args(args)
    resolve(config, ModelConfig.load(config))
    ApiKeys.load(config.api_keys_file)
    return config


def check_file(path: str, overrides: dict[str, str] | None = None) -> dict[str, Any]:
    """Read the YAML file at `path` and check every application of it that is ours.

    overrides replace args of each such application; their values are read as YAML. Returns the file's content with the
    overrides in place, ready for Serve. Raises ConfigError whose key begins with the file's name.
    """
    prefix = f"{path}: "
    changes = {name: yaml.safe_load(value) for name, value in (overrides or {}).items()}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(path, path, error.strerror or "not readable") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(path, str(error), "a YAML file") from None
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list) or not applications:
        raise ConfigError(f"{prefix}applications", applications, "a list with at least one application")
    for index, application in enumerate(applications):
        key = f"applications[{index}]"
        if not isinstance(application, dict) or "import_path" not in application:
            raise ConfigError(f"{prefix}{key}.import_path", None, f"this key is required; for Manta: {IMPORT_PATH}")
        if application["import_path"] != IMPORT_PATH:
            continue
        args = application.get("args") or {}
        if not isinstance(args, dict):
            raise ConfigError(f"{prefix}{key}.args", args, "a mapping of configuration keys")
        application["args"] = args = {**args, **changes}
        try:
            check(args)
        except ConfigError as error:
            raise error.under(f"{prefix}{key}.args.") from None
    _check_http(content.get("http_options"), prefix)
    return dict(content)


class HttpSection(BaseModel):
    """The part of Serve's http_options that this repository reads itself."""

    model_config = ConfigDict(extra="allow")

    host: str = "0.0.0.0"
    port: int = Field(8000, ge=0, le=65535)
    root_path: Literal[""] | str = ""


def _check_http(options: object, prefix: str) -> None:
    try:
        HttpSection.model_validate(options or {})
    except ValidationError as error:
        raise config_error(error, HttpSection, f"{prefix}http_options.") from None


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """KEY=VALUE arguments as a dict. Raises ConfigError for anything else."""
    pairs = {}
    for argument in arguments:
        match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", argument, re.DOTALL)
        if match is None:
            raise ConfigError("argument", argument, "KEY=VALUE")
        pairs[match[1]] = match[2]
    return pairs


def main(arguments: list[str]) -> int:
    """Check the file named first; 0 when it can be served, 2 with one line on stderr when not."""
    if not arguments:
        print("usage: python -m deployments.config FILE [KEY=VALUE ...]", file=sys.stderr)
        return 2
    try:
        check_file(arguments[0], parse_overrides(arguments[1:]))
    except MantaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[0]}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
