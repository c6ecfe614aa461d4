"""Configuration files: what is wrong is named by key, with what came and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import REPOSITORY, AppConfig, check, check_file, main, parse_overrides
from engine.errors import ConfigError

TINY = {"model": "configs/tiny", "device": "cpu"}


@pytest.fixture
def llama3(tmp_path: Path) -> Path:
    """configs/llama3.yaml with a local folder of Llama-3-8B's shape."""
    folder = tmp_path / "Meta-Llama-3-8B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256,'
        '"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,'
        '"max_position_embeddings": 8192, "torch_dtype": "bfloat16", "eos_token_id": 128009, "bos_token_id": 128000}'
    )
    content = yaml.safe_load((REPOSITORY / "configs/llama3.yaml").read_text())
    content["applications"][0]["args"]["model"] = str(folder)
    path = tmp_path / "llama3.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "app.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def app(args: Any, **more: Any) -> dict[str, Any]:
    return {"applications": [{"name": "a", "import_path": "deployments.app:build", "args": args}], **more}


@pytest.mark.parametrize("name", ["tiny"])
def test_files_in_the_repository(name: str) -> None:
    content = check_file(f"configs/{name}.yaml")
    assert content["applications"][0]["name"] == name
    assert content["http_options"]["host"] == "127.0.0.1"


def test_llama3(llama3: Path) -> None:
    assert check_file(str(llama3))["applications"][0]["name"] == "llama3"
    changed = check_file(str(llama3), {"tensor_parallel_size": "2", "served_model_name": "[a, b]"})
    assert changed["applications"][0]["args"]["tensor_parallel_size"] == 2
    assert changed["applications"][0]["args"]["served_model_name"] == ["a", "b"]


def test_tensor_parallel_that_does_not_divide(llama3: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_file(str(llama3), {"tensor_parallel_size": "3"})
    assert str(caught.value) == (
        f"{llama3}: applications[0].args.tensor_parallel_size: 3: "
        "does not divide num_key_value_heads (8); use 1, 2, 4 or 8"
    )


@pytest.mark.parametrize(
    "args, key, words",
    [
        ({"max_seqs": 1}, "max_seqs", "unknown key; allowed: api_keys_file, autoscaling"),
        ({"max_num_seqs": 0}, "max_num_seqs", "greater than or equal to 1"),
        ({"max_num_seqs": "many"}, "max_num_seqs", "integer"),
        ({"dtype": "int4"}, "dtype", "'float32'"),
        ({"block_size": 17}, "block_size", "16"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "less than or equal to 1"),
        ({"model": "no/such/folder"}, "model", "no such folder"),
        ({"model": "configs"}, "model", "config.json"),
        ({"max_model_len": 4096}, "max_model_len", "2048"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size", "1, 2 or 4"),
        ({"max_ongoing_requests": 5}, "", "at least max_num_seqs (256)"),
        ({"autoscaling": {"min": 1}}, "autoscaling.min", "unknown key; allowed"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "autoscaling", "above max_replicas"),
        ({"model": None}, "model", "string"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_args(tmp_path: Path, args: dict[str, Any], key: str, words: str) -> None:
    path = write(tmp_path, app({**TINY, **args}))
    with pytest.raises(ConfigError) as caught:
        check_file(path)
    assert str(caught.value).startswith(f"{path}: applications[0].args.{key}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ("applications: [", "a YAML file"),
        ("just text", "a list with at least one application"),
        ({"applications": []}, "a list with at least one application"),
        ({"applications": [{"name": "a"}]}, "applications[0].import_path"),
        (app("args"), "applications[0].args: 'args': a mapping"),
        (app({"device": "cpu"}), "applications[0].args.model: None: this key is required"),
        (app(TINY, http_options={"port": 99999}), "http_options.port: 99999"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_files(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_file(write(tmp_path, content))
    assert words in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        check_file("configs/none.yaml")


def test_overrides() -> None:
    assert parse_overrides(["model=a=b", "max_num_seqs=4"]) == {"model": "a=b", "max_num_seqs": "4"}
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_overrides(["model"])


def test_strings_stand_for_values() -> None:
    """What `serve run deployments.app:build KEY=VALUE` passes."""
    config = check({"model": "configs/tiny", "max_num_seqs": "8", "block_size": "32", "enforce_eager": "true"})
    assert (config.max_num_seqs, config.block_size, config.enforce_eager) == (8, 32, True)
    assert check({**TINY, "served_model_name": "7"}).names == ("7",)


def test_names_and_limits() -> None:
    config = AppConfig.from_args(**TINY)
    assert config.names == ("tiny",)
    assert config.ongoing_requests >= config.max_num_seqs
    assert AppConfig.from_args(model="owner/name").names == ("owner/name",)
    assert AppConfig.from_args(**TINY, served_model_name=["a", "b"]).names == ("a", "b")
    assert not isinstance(config.engine, AppConfig)
    assert config.engine.max_num_seqs == config.max_num_seqs


def test_model_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert AppConfig.from_args(**TINY).model == str(REPOSITORY / "configs/tiny")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/tiny.yaml"]) == 0
    assert capsys.readouterr().out == "configs/tiny.yaml: ok\n"
    assert main(["configs/tiny.yaml", "dtype=int4"]) == 2
    assert capsys.readouterr().err.startswith("error: configs/tiny.yaml: applications[0].args.dtype: 'int4'")
    assert main([]) == 2


def test_run_refuses_a_bad_file_at_once() -> None:
    """Before Ray is even imported."""
    command = [sys.executable, "-m", "scripts.run", "configs/tiny.yaml", "tensor_parallel_size=3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: configs/tiny.yaml: applications[0].args.tensor_parallel_size: 3: "
        "does not divide num_key_value_heads (4); use 1, 2 or 4"
    )
