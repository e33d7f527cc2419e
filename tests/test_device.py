"""Names of devices and dtypes: those of this machine are found; others are errors that say what to use."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from opensoraplan.device import (
    available,
    explain_full_memory,
    free_in_container,
    free_memory,
    is_out_of_memory,
    prepare,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_cpu(name: str) -> None:
    assert resolve_device(name) == CPU


@pytest.mark.parametrize("name", [None, "auto"])
def test_the_first_accelerator_is_taken(name: str | None) -> None:
    assert resolve_device(name).type == available().split(" or ")[0]
    assert (resolve_device(name).type == "cuda") == CUDA


def test_available_ends_with_cpu() -> None:
    assert available().endswith("cpu")
    assert ("cuda" in available()) == CUDA


@pytest.mark.parametrize(
    "name", ["nonsense", "", "CUDA", "mps", "meta", "cuda:x", "cuda:", "cuda:-1", "npu:a"]
)
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is not one of cpu, cuda, npu .*: use .*cpu"):
        resolve_device(name)


def test_a_card_that_is_not_there() -> None:
    message = (
        r"'cuda:99': there are \d+, the last is cuda:" if CUDA else "there is no cuda device on this machine"
    )
    with pytest.raises(ValueError, match=message):
        resolve_device("cuda:99")


def test_npu_without_its_package() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        message = r"there is no npu device on this machine \(torch_npu is not installed, .*: use .*cpu"
        with pytest.raises(ValueError, match=message):
            resolve_device("npu")
    else:
        assert resolve_device("npu").type == "npu"


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), (None, torch.bfloat16)]
)
def test_dtypes(name: str | None, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, CPU) == dtype


def test_fp16_is_for_accelerators(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_dtype("fp16", torch.device("cuda")) == torch.float16
    assert not caplog.records
    assert resolve_dtype("fp16", CPU) == torch.bfloat16
    ((_, level, message),) = caplog.record_tuples
    assert level == logging.WARNING
    assert "computing in bf16" in message


def test_fp16_on_a_cpu_names_what_runs_in_bf16_instead(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_dtype("fp16", CPU, use="decoding") == torch.bfloat16
    assert caplog.messages[0].endswith(": decoding in bf16")


@pytest.fixture
def tf32() -> Iterator[Callable[[], tuple[bool, bool]]]:
    """Reads both of torch's settings of TF32, which the test may change."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield lambda: (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_on_cuda_alone(tf32: Callable[[], tuple[bool, bool]], allowed: bool) -> None:
    before = tf32()
    prepare(torch.device("cuda"))
    prepare(CPU, allow_tf32=allowed)
    assert tf32() == before
    prepare(torch.device("cuda"), allow_tf32=allowed)
    assert tf32() == (allowed, allowed)


@pytest.mark.parametrize(("name", "near"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32")])
def test_dtypes_by_other_names(name: str, near: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{name}' is not one of bf16, fp16, fp32 \(did you mean '{near}'\?\)"
    ):
        resolve_dtype(name, CPU)


@pytest.mark.parametrize(("prepared", "few"), [(False, False), (True, True)])
def test_a_prepared_process_keeps_the_memory_that_it_has_freed(prepared: bool, few: bool) -> None:
    script = f"""
import resource, torch
from opensoraplan.device import prepare
if {prepared}:
    prepare(torch.device("cpu"))
for _ in range(20):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    # 40 MB are 10,000 pages, or 20 huge ones.
    assert (int(done.stdout) < 100) is few


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("NPU out of memory. Tried to allocate 256.00 MiB"),
    ],
)
def test_full_memory_is_told_from_other_errors(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(MemoryError, match="nine clips do not fit"),
        explain_full_memory("nine clips do not fit"),
    ):
        raise error
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(other)
    with pytest.raises(RuntimeError, match="mat1"), explain_full_memory("nine clips do not fit"):
        raise other


def test_free_memory_of_the_host_is_a_part_of_it() -> None:
    assert 0 < free_memory(CPU) < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("place", "limit", "used", "cached"),
    [
        ("", "memory.max", "memory.current", "file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ],
)
def test_a_container_has_no_more_than_it_may(
    tmp_path: Path, place: str, limit: str, used: str, cached: str
) -> None:
    assert free_in_container(tmp_path) is None
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / used).write_text("4000\n")
    (folder / "memory.stat").write_text(f"anon 1500\n{cached} 2500\n")
    for text, free in (("5000", 3500), ("1000", 0), ("max", None)):
        (folder / limit).write_text(f"{text}\n")
        assert free_in_container(tmp_path) == free
