"""Parity on the kinds of CPU that this one can pose as: fewer instructions give other last bits, not other results."""

import os
import subprocess
import sys

import pytest
import torch

# Of torch's own kernels, of oneDNN (bf16 products) and of MKL (fp32 products, LAPACK; obeyed on Intel only).
CPU_KINDS = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
CAN_BE = list(CPU_KINDS)[: list(CPU_KINDS).index(torch.backends.cpu.get_cpu_capability()) + 1]
# The tests whose results are compared after many steps, or bit by bit
SENSITIVE = [
    "tests/functional/test_orthogonalize.py::test_muon_with_eps_equals_torch_bit_for_bit_at_every_scale_and_tall",
    "tests/optim/test_dion.py",
    "tests/distributed/test_optim_parity.py::test_bf16_matrices_beside_fp32_norms_equal_one_process",
]


def run_as(kind: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **CPU_KINDS[kind], "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)  # 50 s on an idle core
@pytest.mark.parametrize("kind", CAN_BE)
def test_sensitive_tests_pass_on_lesser_cpus(kind):
    seen = run_as(kind, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())")
    assert seen.stdout.split() == [kind], seen.stderr
    result = run_as(kind, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SENSITIVE)
    assert result.returncode == 0, result.stdout
